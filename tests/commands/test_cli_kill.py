"""Runs that end by SIGKILL or Ctrl-C, and runs beside each other: in processes of their own."""

import json
import signal
from pathlib import Path

import model_builders as build
import pytest

from nufilt_jax.checkpoints import open_checkpoint

KILLER = Path(__file__).with_name("killer.py")
PLACE = "nufilt_jax.output.place"
FAST = ("--method", "weight_average")

# What is called, which time, and whether the kill comes before or after: see DIR.partial in `OutputPlace`.
MERGE_POINTS = {
    "a window is half written": "nufilt_jax.output.state:write_json:window-0000-3:before",
    "a window is kept and the recipe is not": f"{PLACE}:save_window:1:after",
    "a step is recorded": f"{PLACE}:OutputPlace.record:2:after",
    "the model is half written": "nufilt_jax.checkpoints.safetensors_files:write_file:out.partial/output:after",
}
SWAP_POINTS = {
    "in the middle of the swap": "os:replace:out.partial/previous:after",
    "after the swap": "os:replace:out.partial/output'):after",
    "while tidying up": "os:unlink:arrays.safetensors:after",
}


def beside(out):
    return {path.name for path in out.parent.iterdir()} - {out.name, f"{out.name}.lock"}


@pytest.mark.parametrize("point", MERGE_POINTS)
def test_killed_merge_resumes_to_the_same_bits(shared_models, tmp_path, nufilt, finish, command, point):
    options = () if point == "a step is recorded" else FAST
    argv = command(shared_models, tmp_path / "out", *options, "--json")
    killed = finish(KILLER, MERGE_POINTS[point], "kill", *argv)
    assert killed.code == -signal.SIGKILL, killed.err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.lock").exists()  # and does not block
    assert list((tmp_path / "out.partial" / "state").glob("window-0000-*"))
    resumed = nufilt(*argv)
    assert resumed.code == 0, resumed.err
    assert resumed.json["steps"][0]["resumed"]
    assert len(resumed.json["steps"]) == 3
    assert beside(tmp_path / "out") == set()
    assert nufilt(*command(shared_models, tmp_path / "whole", *options)).code == 0
    assert build.weight_bytes(tmp_path / "out") == build.weight_bytes(tmp_path / "whole")
    names = ("out", "whole")
    assert len({(tmp_path / name / "forecast.json").read_bytes() for name in names}) == 1


@pytest.mark.parametrize("point", SWAP_POINTS)
def test_killed_add_shows_one_whole_model_or_none(shared_models, tmp_path, nufilt, finish, command, point):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, *FAST, n=2)).code == 0
    argv = ["add", out, "--task", f"gamma={shared_models / 'gamma'}", "--json"]
    killed = finish(KILLER, SWAP_POINTS[point], "kill", *argv)
    assert killed.code == -signal.SIGKILL, killed.err
    assert out.exists() == (point != "in the middle of the swap")
    if out.exists():
        open_checkpoint(str(out), role="base").read()
        assert json.loads((out / "nufilt.json").read_text())["tasks"][-1]["name"] == "gamma"
    assert nufilt(*argv, "--seed", "9").code == 1
    assert out.exists()  # mended before anything else
    resumed = nufilt(*argv)
    assert (resumed.code, len(resumed.json["steps"])) == (0, 3), resumed.err
    assert beside(out) == set()
    assert nufilt(*command(shared_models, tmp_path / "whole", *FAST)).code == 0
    assert build.weight_bytes(out) == build.weight_bytes(tmp_path / "whole")


def test_ctrl_c_and_the_lock(shared_models, tmp_path, nufilt, spawn, command):
    out = tmp_path / "out"
    argv = command(shared_models, out, *FAST)
    first = spawn(KILLER, "nufilt_jax.engine.walk:Walk._merge:3:before", "wait", *argv)
    assert first.stdout.readline() == "waiting\n"
    second = nufilt(*argv)
    assert (second.code, second.lines) == (
        1,
        [f"nufilt: {out}: another run is writing here (wait for it, or choose another --out)"],
    )
    first.send_signal(signal.SIGINT)
    rest, err = first.communicate(timeout=60)
    assert (first.returncode, rest) == (130, "")
    assert 1 <= len(err.splitlines()) <= 3 and "Traceback" not in err
    assert (tmp_path / "out.partial").is_dir() and not out.exists()
    done = nufilt(*argv, "--json")
    assert [step["resumed"] for step in done.json["steps"]] == [True, True, False]


def test_sigterm_ends_a_run_as_ctrl_c_does(shared_models, tmp_path, nufilt, spawn, command):
    argv = command(shared_models, tmp_path / "out", *FAST)
    run = spawn(KILLER, "nufilt_jax.engine.walk:Walk._merge:3:before", "wait", *argv)
    assert run.stdout.readline() == "waiting\n"
    run.terminate()
    rest, err = run.communicate(timeout=60)
    told = "nufilt: terminated; the same command again goes on after the last finished step"
    assert (run.returncode, rest, err.splitlines()[-1]) == (143, "", told)
    done = nufilt(*argv, "--json")
    assert [step["resumed"] for step in done.json["steps"]] == [True, True, False]


IMPORT = "import strikes"
COLLECT = "import gc, os, signal; gc.callbacks.append(lambda *_: os.kill(os.getpid(), signal.SIGINT)); gc.collect()"


@pytest.mark.parametrize("where", [IMPORT, COLLECT], ids=["in an import", "in a callback"])
def test_ctrl_c_where_python_would_lose_it(tmp_path, finish, where):
    (tmp_path / "strikes.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    )
    code = f"import nufilt_jax.cli as cli\nwith cli.orderly_interrupts():\n    {where}\n    print('went on')"
    result = finish("-c", code, cwd=tmp_path)
    assert (result.code, result.out, len(result.lines)) == (130, "", 1), result.err
