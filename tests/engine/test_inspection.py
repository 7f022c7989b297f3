"""What reading the weights tells before any work, and what can be told only when the model is written."""

import json
import shutil

import model_builders as build
import numpy as np
import pytest

from nufilt_jax.commands import merge as merge_command
from nufilt_jax.engine import walk

FAST = ("--method", "sum")
NORM = "vision_model.pre_layrnorm.weight"


@pytest.fixture
def inspections(monkeypatch):
    """What every command run in the test found."""
    found, inspect = [], merge_command.inspect
    monkeypatch.setattr(merge_command, "inspect", lambda plan: found.append(inspect(plan)) or found[-1])
    return found


def test_how_far_every_task_moved_every_tensor(shared_models, tmp_path, nufilt, command, inspections):
    assert nufilt(*command(shared_models, tmp_path / "out", *FAST)).code == 0
    base = build.weights(shared_models / "base")
    [inspection] = inspections
    assert list(inspection.changes) == ["alpha", "beta", "gamma"]
    for name, changes in inspection.changes.items():
        task = build.weights(shared_models / name)
        expected = {key: float(((task[key] - x).astype(np.float64) ** 2).sum()) for key, x in base.items()}
        assert changes == pytest.approx(expected, rel=1e-6)


def test_a_task_that_did_not_move_and_one_that_is_not_finite(models, tmp_path, nufilt, command, inspections):
    build.write(models / "same", build.tower(0))
    sick = build.fine_tuned(build.tower(0), 1)
    sick[NORM][0] = np.nan
    build.write(models / "sick", sick)
    result = nufilt(*command(models, tmp_path / "out", *FAST, tasks=("same", "sick")))
    assert (result.code, NORM in result.err) == (0, True)
    [inspection] = inspections
    assert set(inspection.changes["same"].values()) == {0.0}
    assert NORM not in inspection.changes["sick"] and build.Q0 in inspection.changes["sick"]


def test_only_the_tasks_that_are_read_have_moved(shared_models, tmp_path, nufilt, command, inspections):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, *FAST, n=2)).code == 0
    assert nufilt("add", out, "--task", f"gamma={shared_models / 'gamma'}").code == 0
    assert nufilt(*command(shared_models, out, *FAST)).code == 0
    assert [list(inspection.changes) for inspection in inspections] == [
        ["alpha", "beta"],
        ["gamma"],
        list(build.TASKS[:3]),
    ]
    assert set(map(len, inspections[-1].changes.values())) == {0}  # finished: its hashes are all that is asked
    recipe = json.loads((out / "nufilt.json").read_text())
    assert inspections[-1].task_sha256 == {task["name"]: task["sha256"] for task in recipe["tasks"]}


@pytest.mark.parametrize("shards", [1, 3])
def test_a_number_that_cannot_be_written_is_found_before_any_work(models, tmp_path, refused, command, shards):
    """Where no task is asked: --dtype float16, and a base in bfloat16 with 1e5 in a norm that no method touches."""
    base = build.as_bfloat16(build.tower(0))
    for name in (NORM, "vision_model.post_layernorm.weight"):
        base[name][:2] = 1e5
    build.write(models / "large", base, shards=shards)
    argv = [
        str(models / "large") if part == str(models / "base") else part for part in command(models, tmp_path / "out")
    ]
    lines = refused(*argv, "--dtype", "float16")
    assert len(lines) == 2 and all("/large/model" in line for line in lines)
    end = "has numbers out of the range of float16 (write a wider --dtype)"
    assert {line.split(": ", 2)[2] for line in lines} == {
        f"{NORM}: {end}",
        f"vision_model.post_layernorm.weight: {end}",
    }


def test_a_number_that_is_written_as_it_is_or_merged_is_none_of_it(models, tmp_path, nufilt, command):
    base = build.as_bfloat16(build.tower(0))
    base[NORM][:2] = 1e5
    build.write(models / "large", base)
    argv = [
        str(models / "large") if part == str(models / "base") else part for part in command(models, tmp_path / "out")
    ]
    assert nufilt(*argv, "--dtype", "bfloat16", *FAST).code == 0
    # Every tensor is merged, and where tasks are far smaller than the base the result fits.
    others = ("--method", "weight_average", "--dtype", "float16")
    argv = [part if part != str(tmp_path / "out") else str(tmp_path / "other") for part in argv]
    assert nufilt(*argv, *others).code == 0
    saved = build.weights(tmp_path / "other")[NORM]
    assert saved.dtype == np.float16 and np.isfinite(saved).all()


def test_a_merged_number_that_cannot_be_written_leaves_what_is_merged(models, tmp_path, nufilt, command, monkeypatch):
    tensors = build.weights(models / "beta")
    tensors[build.Q0][:] = 1e9
    shutil.rmtree(models / "beta")
    build.write(models / "beta", tensors)
    out = tmp_path / "out"
    argv = command(models, out, *FAST, "--dtype", "float16")
    result = nufilt(*argv)
    assert (result.code, len(result.lines)) == (1, 1), result.err
    assert build.Q0 in result.err and "has numbers out of the range of float16 (write a wider --dtype" in result.err
    assert f"what is merged is kept in {tmp_path / 'out.partial'}" in result.err
    assert not out.exists() and not (tmp_path / "out.partial" / "output").exists()
    recorded = json.loads((tmp_path / "out.partial" / "nufilt.json").read_text())
    assert [step["task"] for step in recorded["steps"]] == ["alpha", "beta", "gamma"]
    monkeypatch.setattr(walk, "update", None)  # nothing is merged again
    assert nufilt(*argv).err == result.err
