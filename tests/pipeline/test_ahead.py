"""Reading ahead and writing behind: what goes on beside a step changes neither results nor messages."""

import json
import shutil
import threading
import weakref
from contextlib import closing

import pipeline_builders as build
import pytest

from nufilt_jax.pipeline import run as pipeline_run
from nufilt_jax.pipeline.ahead import read_ahead

FAST = ("--method", "sum")


def test_one_item_is_loaded_ahead_and_no_more():
    loaded, reached = [], threading.Event()

    def load(item, stop):
        loaded.append(item)
        if item == "b":
            reached.set()
        return item.upper()

    with closing(read_ahead(load, ["a", "b", "c", "d"])) as items:
        assert next(items) == "A"
        assert reached.wait(10)
        assert loaded == ["a", "b"]
        assert list(items) == ["B", "C", "D"]
    assert list(read_ahead(load, [])) == []


def test_a_failed_load_is_told_in_its_turn():
    def load(item, stop):
        return 1 / item

    with closing(read_ahead(load, [1, 0, 2])) as items:
        assert next(items) == 1
        with pytest.raises(ZeroDivisionError):
            next(items)


def test_closing_ends_the_load_under_way():
    ended = []

    def load(item, stop):
        ended.append(item > 0 and stop.wait(60))

    with closing(read_ahead(load, [0, 1, 2])) as items:
        next(items)
    assert ended == [False, True]


def test_at_most_two_task_vectors_are_alive(shared_models, tmp_path, nufilt, command, monkeypatch):
    made, alive = [], []
    task_vector = pipeline_run.task_vector

    def counted(*args):
        result = task_vector(*args)
        made.append(weakref.ref(result.stacks[0]))
        alive.append(sum(stack() is not None for stack in made))
        return result

    monkeypatch.setattr(pipeline_run, "task_vector", counted)
    assert nufilt(*command(shared_models, tmp_path / "out", n=4)).code == 0
    assert len(alive) == 4 and max(alive) == 2


def test_a_task_that_cannot_be_read_leaves_the_steps_before_it(models, tmp_path, nufilt, command, monkeypatch):
    load = pipeline_run._load

    def after_removal(plan, names, name, stop):
        if name == "gamma":  # read while beta is merged
            shutil.rmtree(models / "gamma")
        return load(plan, names, name, stop)

    monkeypatch.setattr(pipeline_run, "_load", after_removal)
    result = nufilt(*command(models, tmp_path / "out", *FAST))
    assert (result.code, result.out, len(result.lines)) == (1, "", 1)
    assert result.err.startswith(f"nufilt: {models / 'gamma' / 'model.safetensors'}: ")
    assert len(json.loads((tmp_path / "out.partial" / "nufilt.json").read_text())["steps"]) == 2
    monkeypatch.undo()
    build.write(models / "gamma", build.fine_tuned(build.tower(0), 3))
    again = nufilt(*command(models, tmp_path / "out", *FAST, "--json"))
    assert [step["resumed"] for step in again.json["steps"]] == [True, True, False]


def test_a_state_that_cannot_be_written_ends_the_run_in_one_line(shared_models, tmp_path, nufilt, command, monkeypatch):
    from nufilt_jax.checkpoints import place

    save = place.save_state

    def full(folder, arrays, step):
        if step == 2:
            raise OSError(28, "No space left on device", str(folder))
        save(folder, arrays, step)

    monkeypatch.setattr(place, "save_state", full)
    result = nufilt(*command(shared_models, tmp_path / "out", *FAST))
    assert (result.code, len(result.lines)) == (1, 1) and "No space left on device" in result.err
    monkeypatch.undo()
    again = nufilt(*command(shared_models, tmp_path / "out", *FAST, "--json"))
    assert [step["resumed"] for step in again.json["steps"]] == [True, False, False]


def test_a_second_process_compiles_nothing_however_many_tasks(shared_models, tmp_path, finish, command, monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)  # a command run in this process may have set them
    runs = []
    for n_tasks in (3, 4):
        _, *argv = command(shared_models, tmp_path / f"out{n_tasks}", "--json", n=n_tasks)
        runs.append(finish("-m", "nufilt_jax.merge", *argv, env={"NUFILT_CACHE": str(tmp_path / "cache")}))
        assert runs[-1].code == 0, runs[-1].err
    first, second = (run.json["compiled"] for run in runs)
    assert first["programs"] == second["programs"] == second["from_cache"] > 0
    assert first["from_cache"] == 0


def test_the_recipe_tells_where_the_time_went(shared_models, tmp_path, nufilt, command):
    recipe = nufilt(*command(shared_models, tmp_path / "out", "--json")).json
    assert recipe["timings"].keys() == {
        *("plan", "inspect", "copy_state", "write_state", "write_model", "wait_for_state")
    }
    for step in recipe["steps"]:
        assert step["timings"].keys() == {"read", "put", "wait", "solve"}
        assert step["timings"]["solve"] <= step["seconds"]
