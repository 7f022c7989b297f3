"""`--distributed`: several processes on this machine merge one model."""

import json
import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import model_builders as build
import pytest

from nufilt_jax.engine import hosts
from nufilt_jax.errors import ConfigError

KILLER = Path(__file__).with_name("killer.py")
FAST = ("--method", "weight_average")
HASTY = f"""
import runpy, sys
from nufilt_jax.cli import main
from nufilt_jax.commands import watched

_, waiting, point, action, *argv = sys.argv
watched.WAITING = int(waiting)
forked = watched.worked_elsewhere

def armed():
    assert "jax" not in sys.modules  # of a process with threads, a fork may hang
    status = forked()
    if status is None:
        from nufilt_jax.engine import hosts
        hosts._HEARTBEAT = 6
        if point:
            runpy.run_path({str(KILLER)!r})["arm"](point, action)
    return status

watched.worked_elsewhere = armed
sys.exit(main(argv))
"""
STUCK = """
import os, sys, time
from nufilt_jax.commands import watched
from nufilt_jax.errors import NufiltError

watched.WAITING, watched._GRACE = 1, 1
try:
    status = watched.worked_elsewhere()
except NufiltError as error:
    sys.exit(str(error))
if status is not None:
    sys.exit(status)
exec(sys.argv[1])
time.sleep(100)
"""
KILLED = "nufilt_jax.output.place:save_window:1:after"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_listened_at(port):
    with socket.socket() as probe:
        return not probe.connect_ex(("127.0.0.1", port))


@pytest.fixture
def together(spawn):
    """Runs a process for each command, but None; gives code, stdout and stderr of each.

    Each may have a point of `killer.py`, by its number, with one action, or
    be given fewer seconds to wait for the others.
    """

    def run(*commands, points=(), waiting=None, action="kill"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for index, argv in enumerate(commands):
            how = (
                "--distributed",
                "--coordinator",
                f"127.0.0.1:{port}",
                "--processes",
                len(commands),
                "--process",
                index,
            )
            point = dict(points).get(index)
            hasty = ("-c", HASTY, waiting or 300, point or "", action)
            program = hasty if points or waiting else ("-m", "nufilt_jax.cli")
            if argv is not None:
                started.append(spawn(*program, *argv, *how))
        ends = [process.communicate(timeout=300) for process in started]
        return [(process.returncode, *end) for process, end in zip(started, ends, strict=True)]

    return run


def test_killed_half_way_and_gone_on_with_by_more(shared_models, tmp_path, nufilt, together, command):
    """Shards of the output are written by all; a process that lives on ends when another dies."""
    models = tmp_path / "models"
    shutil.copytree(shared_models, models)
    shutil.rmtree(models / "base")
    build.write(models / "base", build.tower(0), shards=3)
    assert nufilt(*command(models, tmp_path / "whole")).code == 0
    argv = command(models, tmp_path / "out", "--json")
    for victim in (1, 0):
        ends = together(argv, argv, points={victim: KILLED})
        assert ends[victim] == (-signal.SIGKILL, "", "")
        code, out, err = ends[1 - victim]
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert err.startswith(f"nufilt: process {victim}: died, or cannot be reached any more (what was written is")
        assert not (tmp_path / "out").exists()
    first, *others = together(argv, argv, argv)
    assert [code for code, _, _ in (first, *others)] == [0, 0, 0], (first, *others)
    assert [(out, err) for _, out, err in others] == [("", ""), ("", "")]
    document = json.loads(first[1])
    assert {row["tasks"] for row in document["windows"]} == {3} and len(document["windows"]) >= 3
    assert build.weight_bytes(tmp_path / "out").keys() == build.weight_bytes(tmp_path / "whole").keys()
    assert build.weight_bytes(tmp_path / "out") == build.weight_bytes(tmp_path / "whole")
    whole, out = ((tmp_path / name / "forecast.json").read_text() for name in ("whole", "out"))
    assert json.loads(out)["steps"][-1]["layers"] == json.loads(whole)["steps"][-1]["layers"]
    assert {path.name for path in tmp_path.iterdir()} == {"models", "whole", "out"}
    # As it stands, one process alone can add to it.
    assert nufilt("add", tmp_path / "out", "--task", f"delta={models / 'delta'}").code == 0


@pytest.mark.parametrize("method", ["ties", "opcm"])
def test_numbers_of_the_whole_model_are_found_together(shared_models, tmp_path, nufilt, together, command, method):
    """Also where one dies between two columns, and where there are more processes than windows."""
    assert nufilt(*command(shared_models, tmp_path / "whole", "--method", method)).code == 0
    argv = command(shared_models, tmp_path / "out", "--method", method, "--json")
    ends = together(argv, argv, points={1: "nufilt_jax.output.place:save_window:2:after"})
    assert [code for code, _, _ in ends] == [1, -signal.SIGKILL], ends
    ends = together(*[argv] * 3)
    assert [code for code, _, _ in ends] == [0] * 3, ends
    assert build.weight_bytes(tmp_path / "out") == build.weight_bytes(tmp_path / "whole")
    n_windows = len(json.loads(ends[0][1])["windows"])
    assert n_windows > 1
    argv = command(shared_models, tmp_path / "many", "--method", method, "--json")
    ends = together(*[argv] * (n_windows + 3))
    assert {code for code, _, _ in ends} == {0}, ends
    assert build.weight_bytes(tmp_path / "many") == build.weight_bytes(tmp_path / "whole")


@pytest.mark.parametrize("method", ["wemoe"])
def test_a_method_that_works_on_the_whole_model_is_refused(shared_models, tmp_path, together, command, method):
    argv = command(shared_models, tmp_path / "out", "--method", method)
    lines = [line for _, _, err in together(argv, argv) for line in err.splitlines()]
    assert any("works on the whole model at once, and processes have a part each" in line for line in lines), lines


def test_one_that_never_comes_is_not_waited_for_for_ever(shared_models, tmp_path, together, command):
    argv = command(shared_models, tmp_path / "out", *FAST)
    ends = together(argv, None, argv, waiting=4)
    said = "nufilt: --distributed: not all processes have come within 4 s (start all of them"
    for code, out, err in ends:
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert err.startswith(said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("does", "code", "said"),
    [
        ("", 1, "distributed: not all processes have come within 1 s (start all of them"),
        ("os.write(2, watched._FATAL.encode())", 1, "process 0: died, or cannot be reached any more"),
        ("os.write(2, b'a line'); watched.have_come(); time.sleep(4); os._exit(7)", 7, "a line"),
    ],
    ids=["never told that all have come", "still there after JAX has given up", "all have come"],
)
def test_a_process_that_jax_does_not_end_is_ended(finish, does, code, said):
    result = finish("-c", STUCK, does)
    assert (result.code, result.out) == (code, "") and result.err.startswith(said), result.err


def test_a_folder_that_vanishes_half_way_stops_all(shared_models, tmp_path, together, command):
    partial = tmp_path / "out.partial"
    argv = command(shared_models, tmp_path / "out", *FAST)
    ends = together(argv, argv, points={0: "nufilt_jax.engine.hosts:Hosts.meet:begun:after"}, action=partial)
    assert [(code, out) for code, out, _ in ends] == [(1, ""), (1, "")], ends
    (line,) = [line for _, _, err in ends for line in err.splitlines()]
    assert line.startswith(f"nufilt: {partial}: is not there, or not any more: ")
    assert not (tmp_path / "out").exists()


def test_interrupted_twice_while_it_waits_for_others(shared_models, tmp_path, spawn, command):
    """JAX waits in C++, where a first Ctrl-C is not heard."""
    port = free_port()
    how = ("--distributed", "--coordinator", f"127.0.0.1:{port}", "--processes", 2, "--process", 0)
    process = spawn("-m", "nufilt_jax.cli", *command(shared_models, tmp_path / "out", *FAST), *how)
    while not is_listened_at(port):
        time.sleep(0.1)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    out, err = process.communicate(timeout=60)
    again = "the same command again goes on after the last finished step"
    assert (process.returncode, out, err) == (130, "", f"nufilt: interrupted; {again}\n")


def test_one_says_what_is_wrong_and_all_stop(shared_models, tmp_path, together, command):
    other = tmp_path / "other"
    shutil.copytree(shared_models, other)
    shutil.rmtree(other / "beta")
    build.write(other / "beta", build.fine_tuned(build.tower(0), 77))
    argv = command(shared_models, tmp_path / "out", *FAST)
    wrong = {
        "task beta: SHA-256 of model.safetensors is ": command(other, tmp_path / "out", *FAST),
        "--other-params is average here, and pretrained for process 0": [*argv, "--other-params", "average"],
        f"{tmp_path / 'elsewhere.partial'}: is not there, or not any more: ": command(
            shared_models, tmp_path / "elsewhere", *FAST
        ),
        "--method: 'summ' is not known": command(shared_models, tmp_path / "out", "--method", "summ"),
    }
    for said, theirs in wrong.items():
        ends = together(argv, theirs)
        assert [(code, out) for code, out, _ in ends] == [(1, ""), (1, "")], ends
        lines = [line for _, _, err in ends for line in err.splitlines()]
        assert len(lines) == 1, lines
        line = lines[0]
        assert line.startswith("nufilt: ") and said in line
        assert not (tmp_path / "out").exists()


CLUSTER = ("--coordinator", "127.0.0.1:9", "--processes", "2", "--process")
REFUSED = {
    "--coordinator: belongs to --distributed": (2, ("--coordinator", "127.0.0.1:9")),
    "--process: must be at least 0 and below --processes, got 2": (2, ("--distributed", *CLUSTER, "2")),
    "--distributed: does not go with an evaluation": (2, ("--distributed", *CLUSTER, "0", "--evaluate")),
    "--distributed: finds no other processes": (1, ("--distributed",)),
}


@pytest.mark.parametrize("said", REFUSED)
def test_refused_before_anybody_is_looked_for(shared_models, tmp_path, finish, command, said):
    code, options = REFUSED[said]
    result = finish("-m", "nufilt_jax.cli", *command(shared_models, tmp_path / "out", *FAST, *options))
    assert (result.code, len(result.lines)) == (code, 1), result.err
    assert result.lines[0].startswith(f"nufilt: {said}")


def test_a_coordinator_that_cannot_be_reached_is_one_line(monkeypatch):
    def unreachable(**_):
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", unreachable)
    cluster = hosts.Cluster("127.0.0.1:9", 2, 1)
    with pytest.raises(ConfigError, match="coordinator cannot be reached: DEADLINE_EXCEEDED"), hosts.together(cluster):
        pass
