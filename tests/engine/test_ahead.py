"""Reading ahead and keeping what is done: neither changes results or messages."""

import json
import shutil
import threading
import weakref

import model_builders as build
import numpy as np
import pytest

from nufilt_jax import methods
from nufilt_jax.engine import walk
from nufilt_jax.engine.ahead import ReadAhead
from nufilt_jax.engine.walk import Walk
from nufilt_jax.methods import stacked
from nufilt_jax.output.place import OutputPlace
from nufilt_jax.output.state import StoredWindow, stored_windows
from nufilt_jax.output.stored import Stored

FAST = ("--method", "sum")


def test_one_item_at_a_time_is_loaded_when_told(tmp_path):
    loaded, reached = [], threading.Event()

    def load(item, stop):
        loaded.append(item)
        reached.set()
        return item.upper()

    with ReadAhead(load, ["a", "b", "c"]) as items:
        assert (items.take(), items.has_begun, loaded) == ("A", False, ["a"])
        reached.clear()
        items.begin()
        items.begin()
        assert items.has_begun and reached.wait(10)
        assert loaded == ["a", "b"]
        assert [items.take(), items.take()] == ["B", "C"]
        items.begin()
        assert not items.has_begun
        with pytest.raises(IndexError, match="no item is left"):
            items.take()


def test_a_failed_load_is_told_in_its_turn():
    with ReadAhead(lambda item, stop: 1 / item, [1, 0, 2]) as items:
        assert items.take() == 1
        items.begin()
        with pytest.raises(ZeroDivisionError):
            items.take()


def test_leaving_ends_the_load_under_way():
    ended = []
    with ReadAhead(lambda item, stop: ended.append(item > 0 and stop.wait(60)), [0, 1, 2]) as items:
        items.take()
        items.begin()
    assert ended in ([False], [False, True])


def test_nothing_of_an_item_that_was_taken_is_kept():
    with ReadAhead(lambda item, stop: np.zeros(item), [3, 4]) as items:
        taken = weakref.ref(items.take())
        assert taken() is None
        items.begin()
        taken = weakref.ref(items.take())
        assert taken() is None


def test_task_vectors_that_are_alive(shared_models, tmp_path, nufilt, command, monkeypatch):
    """The one that is merged, and the next; when D is written, none that was merged."""
    loaded, alive, held = [], [], []
    load, update, keep = Walk._load, walk.update, OutputPlace.keep

    def counted(*args):
        task = load(*args)
        loaded.append(weakref.ref(task.vector.stacks[0]))
        return task

    def updated(*args):
        result = update(*args)
        alive.append(sum(stack() is not None for stack in loaded))
        return result

    def kept(*args):
        held.append([stack() is not None for stack in loaded[: len(alive)]])
        return keep(*args)

    monkeypatch.setattr(Walk, "_load", counted)
    monkeypatch.setattr(walk, "update", updated)
    monkeypatch.setattr(OutputPlace, "keep", kept)
    assert nufilt(*command(shared_models, tmp_path / "out", *FAST, n=4)).code == 0
    assert max(alive) <= 2 and held and not any(map(any, held))


@pytest.fixture
def kept(monkeypatch):
    """The number of tasks in each window that is kept, as it happens."""
    keep, done = OutputPlace.keep, []

    def counted(place, window, arrays):
        done.append(window.done)
        return keep(place, window, arrays)

    monkeypatch.setattr(OutputPlace, "keep", counted)
    return done


@pytest.mark.parametrize("share", [0.0, 1e9], ids=["at the end", "after every cell"])
def test_however_often_a_state_is_kept_the_bits_are_the_same(
    shared_models, tmp_path, nufilt, command, monkeypatch, kept, share
):
    assert nufilt(*command(shared_models, tmp_path / "whole", n=4)).code == 0
    kept.clear()
    monkeypatch.setattr(walk, "_KEEPING_SHARE", share)
    assert nufilt(*command(shared_models, tmp_path / "out", n=4)).code == 0
    assert kept == ([4] if share == 0 else [1, 2, 3, 4])
    assert build.weight_bytes(tmp_path / "out") == build.weight_bytes(tmp_path / "whole")
    states = []
    for name in ("out", "whole"):
        with Stored(stored_windows(tmp_path / name / "state")) as stored:
            states.append(stored.deltas(stored.layers))
    assert states[0] and all(build.same_bits(value, states[1][name]) for name, value in states[0].items())


def test_a_state_is_kept_after_a_minute_of_work(shared_models, tmp_path, nufilt, command, monkeypatch, kept):
    monkeypatch.setattr(walk, "_KEEPING_SHARE", 0.0)
    monkeypatch.setattr(walk, "KEPT_EVERY", 0.0)
    assert nufilt(*command(shared_models, tmp_path / "out", *FAST)).code == 0
    assert kept == [1, 2, 3]


def test_a_task_vector_gives_its_memory_back_before_d_is_written(shared_models, tmp_path, nufilt, command, monkeypatch):
    """On the host too, where a device array may have shared what numpy made."""
    rooms, held = [], []
    aligned, keep = stacked._aligned, OutputPlace.keep

    def made(shape):
        array = aligned(shape)
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        rooms.append(weakref.ref(owner))
        return array

    def kept(*args):
        held.append(sum(room() is not None for room in rooms))
        return keep(*args)

    monkeypatch.setattr(stacked, "_aligned", made)
    monkeypatch.setattr(OutputPlace, "keep", kept)
    assert nufilt(*command(shared_models, tmp_path / "out", *FAST, n=1)).code == 0
    assert rooms and held == [0]


def test_the_next_step_takes_the_memory_of_a_state_that_was_written(tmp_path):
    base = {"model.layers.0.self_attn.q_proj.weight": np.ones((64, 64), np.float32)}
    rule = methods.get("sum")
    state = rule.update(rule.init(base), {name: x + 1 for name, x in base.items()})
    where = state.delta.stacks[0].unsafe_buffer_pointer()
    place = OutputPlace(tmp_path / "out")
    kept = place.keep(StoredWindow(place.state, 0, tuple(base), ()), {"delta": state.delta.on_host()})
    moved = rule.update(state, {name: x + 2 for name, x in base.items()}, donate=True)
    assert moved.delta.stacks[0].unsafe_buffer_pointer() == where
    with Stored([kept]) as stored:
        [delta] = stored.deltas(base).values()
    np.testing.assert_array_equal(delta, np.full((64, 64), 1, np.float32))


def test_a_task_that_cannot_be_read_leaves_the_steps_before_it(models, tmp_path, nufilt, command, monkeypatch):
    load = Walk._load

    def after_removal(self, cell, stop):
        if cell.task == 2:
            shutil.rmtree(models / "gamma")
        return load(self, cell, stop)

    monkeypatch.setattr(Walk, "_load", after_removal)
    result = nufilt(*command(models, tmp_path / "out", *FAST))
    assert (result.code, result.out, len(result.lines)) == (1, "", 1)
    assert result.err.startswith(f"nufilt: {models / 'gamma' / 'model.safetensors'}: ")
    assert len(json.loads((tmp_path / "out.partial" / "nufilt.json").read_text())["steps"]) == 2
    monkeypatch.undo()
    build.write(models / "gamma", build.fine_tuned(build.tower(0), 3))
    again = nufilt(*command(models, tmp_path / "out", *FAST, "--json"))
    assert [step["resumed"] for step in again.json["steps"]] == [True, True, False]


def test_a_state_that_cannot_be_written_ends_the_run_in_one_line(shared_models, tmp_path, nufilt, command, monkeypatch):
    from nufilt_jax.output import place

    save = place.save_window

    def full(root, window, arrays):
        if window.done > 1:
            raise OSError(28, "No space left on device", str(root))
        return save(root, window, arrays)

    monkeypatch.setattr(place, "save_window", full)
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
    assert recipe["timings"].keys() == {*("plan", "inspect", "write_state", "write_model", "compile")}
    assert recipe["timings"]["compile"] <= recipe["timings"]["write_model"]
    for step in recipe["steps"]:
        assert step["timings"].keys() == {"read", "put", "wait", "solve", "compile"}
        assert step["timings"]["solve"] <= step["seconds"]
