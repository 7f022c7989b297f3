"""What a loss of power leaves: the old state or the new one, whole, and the new one once it was promised."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from power_loss import Disk

from nufilt_jax import durable
from nufilt_jax.checkpoints import open_checkpoint, save, write_checkpoint
from nufilt_jax.engine.examples import write_examples
from nufilt_jax.evaluation import Task
from nufilt_jax.output import place
from nufilt_jax.output.place import OutputPlace
from nufilt_jax.output.state import load_state, save_state
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


def fake_save(folder, arrays, step):
    (folder / "d").mkdir(parents=True)
    (folder / "d" / "arrays").write_text(f"{arrays} {step}")
    (folder / "meta").write_text(str(step))


def fake_load(folder):
    step = int((folder / "meta").read_text())
    assert (folder / "d" / "arrays").read_text() == f"{ {'D': step} } {step}"
    return {}, step


def recipe(n_steps):
    return {"steps": [f"step {n}" for n in range(n_steps)]}


def stage(where, n_steps):
    where.staging.mkdir()
    (where.staging / "model").write_text(f"model of {n_steps}")
    (where.staging / "sub").mkdir()
    (where.staging / "sub" / "config").write_text("config")


def steps_found(folder):
    """How many steps a later run finds done; fails if what it finds is not whole."""
    where = OutputPlace(folder / "deep" / "out")
    with where.locked():
        found = where.unfinished()
        if where.out.exists():
            finished = where.finished()
            assert (where.out / "model").read_text() == f"model of {len(finished['steps'])}"
            assert (where.out / "sub" / "config").read_text() == "config"
            assert (where.out / "README.md").read_text() == "card"
            assert json.loads((where.out / "forecast.json").read_text()) == recipe(len(finished["steps"]))
            found = finished if found is None else found
        if found is None:
            return 0
        if found["steps"]:
            where.load_state(len(found["steps"]))
            assert len(where.forecast(99)["steps"]) >= len(found["steps"])
        return len(found["steps"])


def merge(where, first, last):
    """A run that goes on from `first` steps, and says after each call how many are promised."""
    with where.locked():
        where.record(recipe(first), recipe(first), None)
        yield first
        for n in range(first + 1, last + 1):
            where.record(recipe(n), recipe(n), {"D": n})
            yield n
        stage(where, last)
        where.publish(recipe(last), recipe(last), "card")
        yield last


@pytest.mark.parametrize("first", [0, 2], ids=["new", "added"])
def test_a_merge_is_never_less_than_it_was(root, tmp_path, monkeypatch, first):
    monkeypatch.setattr(place, "save_state", fake_save)
    monkeypatch.setattr(place, "load_state", fake_load)
    where = OutputPlace(root / "deep" / "out")
    if first:
        list(merge(where, 0, first))
    disk, least = Disk(root), first
    with disk.watching(monkeypatch):
        for n in merge(where, first, first + 2):
            disk.mark(f"promise {n}")
    require_order(disk)
    for at, instant in enumerate(disk.instants):
        least = int(instant.call.removeprefix("promise ")) if instant.call.startswith("promise ") else least
        for number, crash in enumerate(instant.crashes()):
            folder = tmp_path / f"crash-{at}-{number}"
            disk.restore(*crash, folder)
            assert least <= steps_found(folder) <= first + 2, (instant.call, at)
    for folder in kept(disk, tmp_path / "disk"):
        assert OutputPlace(folder / "deep" / "out").finished() == recipe(first + 2)


def test_a_real_state_reaches_the_disk(root, tmp_path, monkeypatch):
    where = OutputPlace(root / "out")
    arrays = {"delta": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    disk = Disk(root)
    with disk.watching(monkeypatch), where.locked():
        where.record(recipe(1), recipe(1), arrays)
        disk.mark("promise")
        [instant] = [instant for instant in disk.instants if instant.call == "promise"]
        disk.restore(*next(instant.crashes()), tmp_path / "left")
    found, step = load_state(tmp_path / "left" / "out.partial" / "state-1")
    assert step == 1 and found["delta"]["w"].tobytes() == arrays["delta"]["w"].tobytes()


def test_a_state_is_written_without_a_copy(root, monkeypatch):
    big = np.ones((64, 64), np.float32)
    seen = []
    from orbax.checkpoint import type_handlers

    write = type_handlers.NumpyHandler._open_and_write

    def watched(self, value, *rest):
        seen.append(np.shares_memory(value, big))
        return write(self, value, *rest)

    monkeypatch.setattr(type_handlers.NumpyHandler, "_open_and_write", watched)
    save_state(root / "state", {"delta": {"w": big}}, 1)
    assert any(seen)


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
