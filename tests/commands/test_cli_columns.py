"""A merge of several windows that goes by columns, as an evaluated one does: stopped anywhere, and gone on with."""

import contextlib
import signal
import time

import model_builders as build
import pytest
from evaluation_commands import read, with_scores, write_study

from nufilt_jax.engine.evaluation import Evaluation
from nufilt_jax.engine.walk import Walk

MOST = 5000  # bytes of a window: the model's four stacks make three
N_WINDOWS = 3
TASKS = build.TASKS


def merge(study, out, *options):
    tasks = [part for name in TASKS for part in ("--task", f"{name}={study / name}")]
    argv = ("merge", "--base", study / "base", *tasks, "--out", out, *build.RANKS, "--json", *with_scores(study))
    return (*argv, *options)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("texts"), TASKS)


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory):
    """The merge in one window."""
    from nufilt_jax.cli import main

    out = tmp_path_factory.mktemp("whole") / "out"
    assert main([str(part) for part in merge(study, out)]) == 0
    assert len(read(out, "nufilt.json")["windows"]) == 1
    return out


@contextlib.contextmanager
def counted(owner, name, most=None):
    """Counts calls of a method; the one after so many ends the run, as Ctrl-C does."""
    function, made = getattr(owner, name), []

    def called(*args):
        if len(made) == most:
            raise KeyboardInterrupt
        made.append(args)
        return function(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, called)
        yield made


def assert_same(out, whole):
    assert build.weight_bytes(out) == build.weight_bytes(whole)
    assert (out / "forecast.json").read_bytes() == (whole / "forecast.json").read_bytes()
    scores = [[step["accuracy"] for step in read(folder, "nufilt.json")["steps"]] for folder in (out, whole)]
    assert scores[0] == scores[1]
    rows = [{**read(folder)["models"][0], "seconds": None, "compile": None} for folder in (out, whole)]
    assert rows[0] == rows[1]


def test_windows_give_the_same_bits_and_scores(study, whole, tmp_path, nufilt, in_windows):
    in_windows(MOST)
    with counted(Walk, "_merge") as cells:
        result = nufilt(*merge(study, tmp_path / "out"))
    assert result.code == 0, result.err
    order = [(cell.task, cell.window.number) for _, cell, *_ in cells]
    assert order == [(task, window) for task in range(len(TASKS)) for window in range(N_WINDOWS)]
    assert_same(tmp_path / "out", whole)


@pytest.mark.parametrize("cell", range(1, N_WINDOWS * len(TASKS)))
def test_stopped_before_any_cell(study, whole, tmp_path, nufilt, in_windows, cell):
    in_windows(MOST)
    with counted(Walk, "_merge", cell):
        assert nufilt(*merge(study, tmp_path / "out")).code == 130
    kept = read(tmp_path / "out.partial", "nufilt.json")
    assert sum(row["tasks"] for row in kept["windows"]) == cell
    assert len(kept["steps"]) == cell // N_WINDOWS and all(step["accuracy"] for step in kept["steps"])
    with counted(Walk, "_merge") as cells, counted(Evaluation, "entry") as scored:
        result = nufilt(*merge(study, tmp_path / "out"))
    assert result.code == 0, result.err
    assert (len(cells), len(scored)) == (N_WINDOWS * len(TASKS) - cell, len(TASKS) - cell // N_WINDOWS)
    assert [step["resumed"] for step in result.json["steps"]] == [n < cell // N_WINDOWS for n in range(len(TASKS))]
    assert_same(tmp_path / "out", whole)


@pytest.mark.parametrize("step", range(len(TASKS)))
def test_stopped_while_the_model_is_scored(study, whole, tmp_path, nufilt, in_windows, step):
    in_windows(MOST)
    with counted(Evaluation, "entry", step):
        assert nufilt(*merge(study, tmp_path / "out")).code == 130
    kept = read(tmp_path / "out.partial", "nufilt.json")["windows"]
    assert [row["tasks"] for row in kept] == [step + 1] * N_WINDOWS
    with counted(Walk, "_merge") as cells, counted(Evaluation, "entry") as scored:
        result = nufilt(*merge(study, tmp_path / "out"))
    assert result.code == 0, result.err
    assert (len(cells), len(scored)) == (N_WINDOWS * (len(TASKS) - step - 1), len(TASKS) - step)
    assert_same(tmp_path / "out", whole)


# In windows, as the fixture cuts them, and telling of cells in the first of the arguments.
IN_WINDOWS = f"""
import pathlib, sys
from nufilt_jax import cli
from nufilt_jax.commands.process import prepare_process
prepare_process()
from benchmarks.study import in_windows
in_windows.arm({MOST}, pathlib.Path(sys.argv[1]))
sys.exit(cli.main(sys.argv[2:]))
"""


def test_killed_in_a_cell(study, whole, tmp_path, nufilt, spawn, in_windows):
    events, begun = tmp_path / "events", 8
    killed = spawn("-c", IN_WINDOWS, events, *merge(study, tmp_path / "out"))
    while killed.poll() is None:
        if events.exists() and events.read_text().count("begin") >= begun:
            killed.kill()
            break
        time.sleep(0.001)
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    assert not (tmp_path / "out").exists()
    in_windows(MOST)
    with counted(Walk, "_merge") as cells:
        assert nufilt(*merge(study, tmp_path / "out")).code == 0
    assert len(cells) in range(1, N_WINDOWS * len(TASKS) - begun + 2)
    assert_same(tmp_path / "out", whole)
