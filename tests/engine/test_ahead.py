"""Reading ahead and writing behind: what goes on beside a step changes neither results nor messages."""

import json
import shutil
import threading
import weakref
from concurrent.futures import Future

import model_builders as build
import numpy as np
import pytest

from nufilt_jax import methods
from nufilt_jax.engine import journal
from nufilt_jax.engine import run as engine_run
from nufilt_jax.engine.ahead import ReadAhead
from nufilt_jax.engine.timing import Clock
from nufilt_jax.methods import stacked
from nufilt_jax.output.place import OutputPlace
from nufilt_jax.output.state import load_state

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


def test_a_load_waits_for_what_it_comes_after():
    first, loaded = Future(), threading.Event()
    with ReadAhead(lambda item, stop: loaded.set(), [1]) as items:
        items.begin(after=first)
        assert not loaded.wait(0.1)
        first.set_exception(OSError())  # which is for others to hear
        assert items.take() is None and loaded.is_set()
    with ReadAhead(lambda item, stop: loaded.set(), [1]) as items:
        items.begin(after=Future())  # leaving does not wait for it


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


@pytest.mark.parametrize("pace", ["quick", "slow"])
def test_task_vectors_that_are_alive(shared_models, tmp_path, nufilt, command, monkeypatch, pace):
    """The one that is merged and, where merging takes long, the next; when D is written, none that was merged."""
    loaded, alive, held = [], [], []
    load, update, add = engine_run._load, engine_run._update, journal.Journal.add

    def counted(*args):
        task = load(*args)
        loaded.append(weakref.ref(task.vector.stacks[0]))
        return task

    def updated(*args):
        result = update(*args)
        alive.append(sum(stack() is not None for stack in loaded))
        return result

    def added(self, *args, copy):
        held.append((copy, [stack() is not None for stack in loaded[: len(alive)]]))
        add(self, *args, copy=copy)

    monkeypatch.setattr(engine_run, "_load", counted)
    monkeypatch.setattr(engine_run, "_update", updated)
    monkeypatch.setattr(journal.Journal, "add", added)
    monkeypatch.setattr(engine_run, "_hides_all", lambda *seconds: pace == "slow")
    assert nufilt(*command(shared_models, tmp_path / "out", *FAST, n=4)).code == 0
    assert max(alive) <= (2 if pace == "slow" else 1)
    assert [any(merged) for _, merged in held] == [False] * 4
    assert [copy for copy, _ in held] == [pace == "slow"] * 3 + [False]


@pytest.mark.parametrize("pace", ["quick", "slow"])
def test_the_ways_of_keeping_a_state_give_the_same_bits(shared_models, tmp_path, nufilt, command, monkeypatch, pace):
    assert nufilt(*command(shared_models, tmp_path / "whole", n=4)).code == 0
    monkeypatch.setattr(engine_run, "_hides_all", lambda *seconds: pace == "slow")
    assert nufilt(*command(shared_models, tmp_path / "out", n=4)).code == 0
    assert build.weight_bytes(tmp_path / "out") == build.weight_bytes(tmp_path / "whole")
    states = [load_state(tmp_path / name / "state")[0]["delta"] for name in ("out", "whole")]
    assert all(build.same_bits(value, states[1][name]) for name, value in states[0].items())


def test_a_task_vector_gives_its_memory_back_before_d_is_written(shared_models, tmp_path, nufilt, command, monkeypatch):
    """On the host too, where a device array may have shared what numpy made."""
    rooms, held = [], []
    aligned, add = stacked._aligned, journal.Journal.add

    def made(shape):
        array = aligned(shape)
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        rooms.append(weakref.ref(owner))
        return array

    def added(self, *args, copy):
        held.append(sum(room() is not None for room in rooms))
        add(self, *args, copy=copy)

    monkeypatch.setattr(stacked, "_aligned", made)
    monkeypatch.setattr(journal.Journal, "add", added)
    assert nufilt(*command(shared_models, tmp_path / "out", *FAST, n=1)).code == 0
    assert rooms and held == [0]


def test_the_next_step_takes_the_memory_of_a_state_that_was_written(tmp_path):
    base = {"model.layers.0.self_attn.q_proj.weight": np.ones((64, 64), np.float32)}
    rule = methods.get("sum")
    state = rule.update(rule.init(base), {name: x + 1 for name, x in base.items()})
    where = state.delta.stacks[0].unsafe_buffer_pointer()
    place = OutputPlace(tmp_path / "out")
    with journal.Journal(place, {"steps": []}, {"steps": []}, Clock()) as kept:
        kept.add({}, {}, state, copy=False)
        kept.wait()
        moved = rule.update(state, {name: x + 2 for name, x in base.items()}, donate=True)
        assert moved.delta.stacks[0].unsafe_buffer_pointer() == where
        kept.add({}, {}, moved, copy=True)
        again = rule.update(moved, base, donate=True)
    assert again.delta.stacks[0].unsafe_buffer_pointer() == where
    [delta] = place.load_state(2)["delta"].values()
    np.testing.assert_array_equal(delta, np.full((64, 64), 3, np.float32))


def test_a_task_that_cannot_be_read_leaves_the_steps_before_it(models, tmp_path, nufilt, command, monkeypatch):
    load = engine_run._load

    def after_removal(plan, base, names, name, stop):
        if name == "gamma":
            shutil.rmtree(models / "gamma")
        return load(plan, base, names, name, stop)

    monkeypatch.setattr(engine_run, "_load", after_removal)
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


def test_only_a_long_merge_hides_reading_and_writing():
    assert engine_run._hides_all(9.0, 4.0, 4.0)
    assert not engine_run._hides_all(7.0, 4.0, 4.0)
    assert not engine_run._hides_all(9.0, float("inf"), 0.0)  # nothing has been written yet
