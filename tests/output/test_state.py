import shutil

import ml_dtypes
import numpy as np
import pytest

from nufilt_jax.errors import CheckpointError, OutputError
from nufilt_jax.output import state
from nufilt_jax.output.recipe import Step
from nufilt_jax.output.spread import save_spread
from nufilt_jax.output.state import CellRecord, StoredWindow, save_window, stored_windows
from nufilt_jax.output.stored import Stored

DELTA = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b[0]": np.float32(2.5)}
BESIDE = {"extra": {"seen": np.arange(3), "half": np.ones(2, ml_dtypes.bfloat16)}, "added": {}}


def cell(task, layers, seconds=1.0, losses=()):
    forecast = {"near_equal_cuts": list(layers[:1]), "layers": {name: {"drift": 0.5} for name in layers}}
    return CellRecord(Step(task=task, seconds=seconds, losses=losses), forecast)


def window(root, number, layers, *tasks, **told):
    layers = tuple(layers)
    return StoredWindow(root, number, layers, tuple(cell(task, layers, **told) for task in tasks))


@pytest.mark.parametrize(
    "name", [".", "mod\udce8le", "模型", "[x] #?%20", "a=b@c:d", 'it\'s "x"', "n" * 240, "\x1b[2J"]
)
def test_a_window_comes_back_in_every_bit(tmp_path, name):
    root = tmp_path / name
    root.mkdir(exist_ok=True)
    kept = save_window(root, window(root, 3, DELTA, "one", "two", losses=(2.0, 1.5)), {"delta": DELTA, **BESIDE})
    assert [path.name for path in root.iterdir()] == ["window-0003-2"]
    assert stored_windows(root) == [kept]
    with Stored([kept]) as stored:
        found = stored.deltas(DELTA), stored.others(DELTA)["extra"]
    for group, wanted in zip(found, (DELTA, BESIDE["extra"]), strict=True):
        assert group.keys() == wanted.keys()
        for key, value in wanted.items():
            assert group[key].dtype == np.asarray(value).dtype
            np.testing.assert_array_equal(group[key], value)


def test_a_newer_state_takes_the_place_of_the_older(tmp_path):
    for tasks in (("one",), ("one", "two")):
        save_window(
            tmp_path, window(tmp_path, 0, "ab", *tasks), {"delta": {name: np.float32(len(tasks)) for name in "ab"}}
        )
    assert [path.name for path in tmp_path.iterdir()] == ["window-0000-2"]


def test_other_windows_can_be_laid_over_what_is_stored(tmp_path):
    parts = {0: "abc", 1: "de"}
    kept = [
        save_window(
            tmp_path,
            window(tmp_path, number, layers, "one", "two", seconds=2.0 + number, losses=(4.0, 1.0)),
            {"delta": {name: np.full(2, ord(name), np.float32) for name in layers}},
        )
        for number, layers in parts.items()
    ]
    with Stored(kept) as stored:
        assert (stored.least, stored.next_number, stored.done("z")) == (2, 2, 0)
        assert {name: x[0] for name, x in stored.deltas("bd").items()} == {"b": ord("b"), "d": ord("d")}
        whole, first, rest = (stored.records(layers) for layers in ("abcde", "ab", "cde"))
        assert [record.step.seconds for record in whole] == [5.0, 5.0]
        assert whole[0].step.losses == (8.0, 2.0)
        # What one window of then took is told once, with its first layer.
        assert [a.step.seconds + b.step.seconds for a, b in zip(first, rest, strict=True)] == [5.0, 5.0]
        assert first[0].forecast == {"near_equal_cuts": ["a"], "layers": {name: {"drift": 0.5} for name in "ab"}}
        with pytest.raises(CheckpointError, match="does not hold the tensors"):
            stored.deltas("az")


def test_the_state_with_the_most_tasks_counts(tmp_path):
    old = save_window(tmp_path, window(tmp_path, 0, "ab", "one"), {"delta": dict.fromkeys("ab", np.float32(1))})
    new = save_window(tmp_path, window(tmp_path, 1, "b", "one", "two"), {"delta": {"b": np.float32(2)}})
    for order in ([old, new], [new, old]):
        with Stored(order) as stored:
            assert (stored.done("a"), stored.done("b"), stored.least) == (1, 2, 1)
            assert stored.deltas("b")["b"] == 2


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda data: data[:-1], "is cut off"),
        (
            lambda data: flipped(data, len(data) - 1),
            "has another checksum in arrays.safetensors than when it was written",
        ),
        (lambda data: flipped(data, 9), "has a header that is not JSON"),
        (lambda data: data.replace(b"delta:a", b"delta:z"), "delta:a is not in arrays.safetensors"),
        (lambda data: data.replace(b"crc32", b"other"), "has no checksums"),
        (lambda data: b"", "too short"),
    ],
)
def test_a_damaged_state_is_refused(tmp_path, damage, what):
    kept = save_window(tmp_path, window(tmp_path, 0, DELTA, "one"), {"delta": DELTA})
    path = kept.folder / "arrays.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with (
        Stored([kept]) as stored,
        pytest.raises(CheckpointError, match="the state of the merge cannot be read") as error,
    ):
        stored.deltas(DELTA)
    assert what in str(error.value)


@pytest.mark.parametrize("is_spread", [False, True], ids=["one file", "orbax"])
def test_arrays_that_are_gone_are_lost(tmp_path, monkeypatch, is_spread):
    """While the window's folder stands; where that is gone too, the next run finds what is there."""
    monkeypatch.setattr(state, "is_spread", lambda _: is_spread)
    kept = save_window(tmp_path, window(tmp_path, 0, DELTA, "one"), {"delta": DELTA})
    [arrays] = [path for path in kept.folder.iterdir() if path.name != "window.json"]
    if is_spread:
        shutil.rmtree(arrays)
        arrays.mkdir()
    else:
        arrays.unlink()
    for read in (Stored.deltas, Stored.others):
        with Stored([kept]) as stored, pytest.raises(CheckpointError, match=r"\(merge again from the start\)"):
            read(stored, DELTA)
    shutil.rmtree(kept.folder)
    with Stored([kept]) as stored, pytest.raises(OutputError, match=r"\(nothing of it is lost: try again\)"):
        stored.deltas(DELTA)


def test_a_state_that_is_written_again_is_read_again(tmp_path):
    told = window(tmp_path, 0, "a", "one")
    with Stored([save_window(tmp_path, told, {"delta": {"a": np.zeros(3, np.float32)}})]) as stored:
        assert not stored.deltas("a")["a"].any()
        stored.add(save_window(tmp_path, told, {"delta": {"a": np.ones(3, np.float32)}}))
        assert stored.deltas("a")["a"].all()


@pytest.mark.parametrize("name", [".", "模型", "[x] #?%20"])
def test_what_is_spread_over_processes_is_an_orbax_checkpoint(tmp_path, name, monkeypatch):
    monkeypatch.setattr(state, "is_spread", lambda _: True)  # one process alone holds nothing that is
    root = tmp_path / name
    kept = save_window(root, window(root, 0, DELTA, "one"), {"delta": DELTA, **BESIDE})
    assert [path.name for path in kept.folder.iterdir() if path.is_dir()] == ["arrays"]
    with Stored([kept]) as stored:
        found = stored.deltas(DELTA), stored.others(DELTA)["extra"]
    for group, wanted in zip(found, (DELTA, BESIDE["extra"]), strict=True):
        assert {key: (x.dtype, x.tobytes()) for key, x in group.items()} == {
            key: (np.asarray(x).dtype, np.asarray(x).tobytes()) for key, x in wanted.items()
        }
    for path in (kept.folder / "arrays").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    with Stored([kept]) as stored, pytest.raises(CheckpointError, match="the state of the merge cannot be read"):
        stored.deltas(DELTA)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="the state cannot be written"):
        save_spread(tmp_path / "file" / "arrays", {"delta": DELTA})


@pytest.mark.parametrize("text", ["{}", '{"layers": ["a"], "cells": [{}]}', "[]", "{"])
def test_a_window_that_tells_nonsense_is_refused(tmp_path, text):
    folder = tmp_path / "window-0000"
    folder.mkdir()
    (folder / "window.json").write_text(text)
    with pytest.raises(OutputError, match=r"window\.json"):
        stored_windows(tmp_path)


def test_a_state_without_room_is_refused_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(OutputError, match=r"the state needs .* MB and 0\.0 MB are free"):
        save_window(tmp_path, window(tmp_path, 0, DELTA, "one"), {"delta": DELTA})
    assert stored_windows(tmp_path) == []
