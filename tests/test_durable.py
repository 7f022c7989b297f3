"""What a loss of power leaves: the old state or the new one, whole, and the new one once it was promised."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from power_loss import Disk, key

from nufilt_jax import durable, methods
from nufilt_jax.checkpoints import open_checkpoint, safetensors_files, save, write_checkpoint
from nufilt_jax.engine.examples import write_examples
from nufilt_jax.evaluation import Task
from nufilt_jax.output import state
from nufilt_jax.output.hashes import changed_files
from nufilt_jax.output.place import OutputPlace
from nufilt_jax.output.recipe import Model, Recipe, Settings, Step
from nufilt_jax.output.state import CellRecord, StoredWindow, stored_windows
from nufilt_jax.output.stored import Stored
from nufilt_jax.zoo import store

sys.path.append(str(Path(__file__).parent / "checkpoints"))
from checkpoint_builders import clip_model, folder_bytes, write_safetensors


def left(disk, tmp_path, since=0):
    """Every folder that a loss of power at any instant could leave, with the call before which it struck."""
    for at, instant in enumerate(disk.instants[since:]):
        for number, crash in enumerate(instant.crashes()):
            folder = tmp_path / f"crash-{since}-{at}-{number}"
            disk.restore(*crash, folder)
            yield instant.call, folder


def kept(disk, tmp_path):
    """The folders that a loss of power right after the end could leave."""
    return [folder for _, folder in left(disk, tmp_path, len(disk.instants) - 1)]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def require_order(disk):
    """Nothing is done to names while a rename may not have reached the disk."""
    for instant in disk.instants:
        renames = [change for change in instant.pending if change.is_rename]
        assert instant.call == "fsync" or not renames, instant.call


def test_a_file_is_the_old_or_the_new(root, tmp_path, monkeypatch):
    (root / "file").write_bytes(b"old")
    disk = Disk(root)
    with disk.watching(monkeypatch):
        durable.atomic_write(root / "file", b"new")
    assert {(folder / "file").read_bytes() for _, folder in left(disk, tmp_path)} == {b"old", b"new"}
    assert [folder_bytes(folder) for folder in kept(disk, tmp_path / "disk")] == [{"file": b"new"}]
    require_order(disk)


def test_a_failed_write_leaves_nothing(root):
    with pytest.raises(OSError, match="stop"), durable.replacing(root / "file") as draft:
        draft.write_bytes(b"half")
        raise OSError("stop")
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("knows", [True, False], ids=["linux", "elsewhere"])
def test_pieces_go_to_the_disk_while_more_are_made(root, monkeypatch, knows):
    sent = []
    monkeypatch.setattr(durable, "_SENT_AT_ONCE", 8)
    if knows:
        monkeypatch.setattr(
            os, "posix_fadvise", lambda _, start, size, advice: sent.append((start, size)), raising=False
        )
        monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    else:
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    pieces = [b"begun", memoryview(b"a" * 8), b"", b"b" * 3, b"c" * 6, b"d"]
    with (root / "file").open("wb") as file:
        file.write(b"head")
        durable.write_pieces(file, pieces)
    assert (root / "file").read_bytes() == b"head" + b"".join(map(bytes, pieces))
    assert sent == ([(4, 13), (17, 9)] if knows else [])


def test_new_folders_stay(root, tmp_path, monkeypatch):
    disk = Disk(root)
    with disk.watching(monkeypatch):
        durable.make_folder(root / "a" / "b" / "c")
        durable.make_folder(root / "a" / "b" / "c")
    assert all((folder / "a" / "b" / "c").is_dir() for folder in kept(disk, tmp_path))


def test_a_tree_stays(root, tmp_path, monkeypatch):
    disk = Disk(root)
    with disk.watching(monkeypatch):
        (root / "tree" / "deep").mkdir(parents=True)
        for name in ("tree/one", "tree/deep/two"):
            (root / name).write_text(name)
        durable.sync_tree(root / "tree")
    names = ("tree/one", "tree/deep/two")
    assert [folder_bytes(folder) for folder in kept(disk, tmp_path)] == [{name: name.encode() for name in names}]


LAYERS = {0: ("a", "b"), 1: ("c",)}  # of two windows


def fake_save(draft, arrays):
    (draft / "arrays" / "d").mkdir(parents=True)
    (draft / "arrays" / "d" / "arrays").write_text(str(arrays))


def recipe(n_steps):
    model = Model("base", "base", None, {"file": "hash"})
    tasks = tuple(Model(f"task{n}", f"task{n}", None, {"file": "hash"}) for n in range(n_steps))
    settings = Settings(method="sum", config=methods.find("sum").config())
    return Recipe(base=model, tasks=tasks, settings=settings, steps=tuple(Step(task=task.name) for task in tasks))


def window(where, number, done):
    cells = [CellRecord(Step(task=f"task{n}"), {"near_equal_cuts": [], "layers": {}}) for n in range(done)]
    return StoredWindow(where.state, number, LAYERS[number], tuple(cells))


def stage(where, n_steps):
    where.staging.mkdir()
    (where.staging / "model").write_text(f"model of {n_steps}")
    (where.staging / "sub").mkdir()
    (where.staging / "sub" / "config").write_text("config")


def cells_found(folder):
    """How many cells a later run finds done; fails if what it finds is not whole."""
    where = OutputPlace(folder / "deep" / "out")
    with where.locked():
        unfinished = where.unfinished()
        if where.out.exists():
            n_steps = len(where.finished()["steps"])
            assert (where.out / "model").read_text() == f"model of {n_steps}"
            assert (where.out / "sub" / "config").read_text() == "config"
            assert (where.out / "README.md").read_text() == "card"
            assert json.loads((where.out / "forecast.json").read_text()) == {"steps": n_steps}
            assert {row.done for row in stored_windows(where.out / "state")} == {n_steps}
        found = where.windows() if unfinished or where.out.exists() else []
        for row in found:
            assert (row.folder / "arrays" / "d" / "arrays").read_text() == str({"D": row.done})
        done = {row.number: max(r.done for r in found if r.number == row.number) for row in found}
        return sum(done.values())


def merge(where, first, last):
    """A run that goes on from `first` steps, row by row, and says after each call how many cells are promised."""
    with where.locked():
        where.record(recipe(first))
        yield 2 * first
        rows = {}
        for number in LAYERS:
            for n in range(first + 1, last + 1):
                rows[number] = where.keep(window(where, number, n), {"D": n})
                where.record(recipe(first if number == 0 else n))
                yield 2 * first + number * (last - first) + n - first
        stage(where, last)
        where.publish(recipe(last), {"steps": last}, "card", rows.values())
        yield 2 * last


@pytest.mark.parametrize("first", [0, 2], ids=["new", "added"])
def test_a_merge_is_never_less_than_it_was(root, tmp_path, monkeypatch, first):
    monkeypatch.setattr(state, "_save_arrays", fake_save)
    where = OutputPlace(root / "deep" / "out")
    if first:
        list(merge(where, 0, first))
    disk, least = Disk(root), 2 * first
    with disk.watching(monkeypatch):
        for n in merge(where, first, first + 2):
            disk.mark(f"promise {n}")
    require_order(disk)
    found = {}
    for at, instant in enumerate(disk.instants):
        least = int(instant.call.removeprefix("promise ")) if instant.call.startswith("promise ") else least
        for number, crash in enumerate(instant.crashes()):
            if key(*crash) not in found:
                folder = tmp_path / f"crash-{at}-{number}"
                disk.restore(*crash, folder)
                found[key(*crash)] = cells_found(folder)
            assert least <= found[key(*crash)] <= 2 * (first + 2), (instant.call, at)
    for folder in kept(disk, tmp_path / "disk"):
        found = OutputPlace(folder / "deep" / "out").finished()
        assert changed_files(folder / "deep" / "out", found.pop("files")) == []
        assert found == recipe(first + 2).to_json()


def test_a_real_merge_is_the_old_or_the_new_and_goes_on(root, tmp_path, monkeypatch, shared_models, command, nufilt):
    """The command itself: what a loss of power leaves is whole, and the same command ends with the same bits."""

    def argv(out):
        return command(shared_models, out, "--method", "sum", n=2)

    def files(out):
        timed = ("nufilt.json", "README.md", "state/window-0000/window.json")
        return {name: data for name, data in folder_bytes(out).items() if name not in timed}

    disk = Disk(root)
    with disk.watching(monkeypatch):
        assert nufilt(*argv(root / "out")).code == 0
    whole, seen = files(root / "out"), {}
    require_order(disk)
    for call, folder in left(disk, tmp_path):
        if (folder / "out").exists():
            assert files(folder / "out") == whole, call
            assert (
                changed_files(folder / "out", json.loads((folder / "out" / "nufilt.json").read_text())["files"]) == []
            )
        seen[tuple(sorted((name, len(data)) for name, data in folder_bytes(folder).items()))] = folder
    assert all(files(folder / "out") == whole for folder in kept(disk, tmp_path / "disk"))
    assert len(seen) > 3
    for folder in list(seen.values())[:: max(1, len(seen) // 6)]:  # all were looked at, and some are gone on with
        assert nufilt(*argv(folder / "out")).code == 0
        assert files(folder / "out") == whole
        assert {path.name for path in folder.iterdir()} == {"out"}


def test_a_real_state_reaches_the_disk(root, tmp_path, monkeypatch):
    where = OutputPlace(root / "out")
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    disk = Disk(root)
    with disk.watching(monkeypatch), where.locked():
        where.record(recipe(1))
        where.keep(window(where, 1, 1), {"delta": {"c": values}})
        disk.mark("promise")
        [instant] = [instant for instant in disk.instants if instant.call == "promise"]
        disk.restore(*next(instant.crashes()), tmp_path / "left")
    with Stored(stored_windows(tmp_path / "left" / "out.partial" / "state")) as stored:
        assert stored.done("c") == 1 and stored.deltas("c")["c"].tobytes() == values.tobytes()


def test_a_state_is_written_without_a_copy(root, monkeypatch):
    big = np.ones((64, 64), np.float32)
    seen = []

    def watched(path, pieces, *rest, **options):
        pieces = [piece._replace(data=list(piece.data)) for piece in pieces]
        seen.extend(np.shares_memory(np.frombuffer(part, np.uint8), big) for piece in pieces for part in piece.data)
        return write_file(path, pieces, *rest, **options)

    write_file = safetensors_files.write_file
    monkeypatch.setattr(safetensors_files, "write_file", watched)
    state.save_window(root, StoredWindow(root, 0, ("w",), ()), {"delta": {"w": big}})
    assert seen == [True]


@pytest.mark.parametrize("what", ["write_checkpoint", "save"])
def test_a_checkpoint_is_whole_or_not_there(root, tmp_path, monkeypatch, what):
    like = open_checkpoint(str(write_safetensors(tmp_path / "m", clip_model(), shards=2)), role="base")
    disk = Disk(root)
    with disk.watching(monkeypatch):
        if what == "save":
            stem = "vision_model.encoder.layers.0.mlp"
            gate = {f"{stem}.gate.weight": np.ones((1, 4), np.float32), f"{stem}.gate.bias": np.ones(1, np.float32)}
            save(gate, root / "deep" / "out", like=like, dtype="bfloat16")
        else:
            write_checkpoint({}, root / "deep" / "out", like=like, dtype="bfloat16")
    whole = folder_bytes(root / "deep" / "out")
    assert len(whole) == 5 + (what == "save")
    assert all(folder_bytes(folder / "deep" / "out") == whole for folder in kept(disk, tmp_path))
    if what == "save":
        require_order(disk)
        found = [folder for _, folder in left(disk, tmp_path) if (folder / "deep" / "out").exists()]
        assert found and all(folder_bytes(folder / "deep" / "out") == whole for folder in found)


def test_built_in_checkpoints_are_whole(root, tmp_path, monkeypatch):
    contents = {"base/config.json": b"{}", "heads.safetensors": b"heads"}
    monkeypatch.setattr(store, "_contents", lambda: contents)
    disk = Disk(root)
    with disk.watching(monkeypatch):
        store.materialise(root / "cache" / "tiny")
    found = [folder / "cache" / "tiny" for _, folder in left(disk, tmp_path)]
    assert all(folder_bytes(folder) == contents for folder in found if folder.exists())
    assert all(folder_bytes(folder / "cache" / "tiny") == contents for folder in kept(disk, tmp_path / "disk"))
    require_order(disk)


def test_examples_are_whole(root, tmp_path, monkeypatch):
    pixels = np.zeros((1, 3, 2, 2), np.float32)
    how = {"class_names": ("c",), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    task = Task(name="a", images=pixels, labels=np.zeros(1, np.int64), head=np.ones((1, 2), np.float32), **how)
    disk = Disk(root)
    with disk.watching(monkeypatch):
        write_examples(root / "examples", [task])
    [whole] = folder_bytes(root).values()
    found = [folder / "examples" / "a.safetensors" for _, folder in left(disk, tmp_path)]
    assert all(path.read_bytes() == whole for path in found if path.exists())
    assert all((folder / "examples" / "a.safetensors").exists() for folder in kept(disk, tmp_path / "disk"))


def test_files_are_written_whole_in_one_way():
    """What renames a file or syncs it does so through `durable`; an output folder's own moves do too."""
    found = []
    for path in Path(durable.__file__).parent.rglob("*.py"):
        text = path.read_text()
        if path.name != "durable.py" and any(word in text for word in ("os.replace(", "os.rename(", "os.fsync(")):
            found.append(path.name)
    assert found == []
