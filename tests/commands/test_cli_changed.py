"""Weight files that are replaced, written over or removed while a merge runs, as a training does."""

import os
import shutil

import model_builders as build
import pytest

import nufilt_jax
from nufilt_jax.engine import loaded, run
from nufilt_jax.engine.unchanged import ChangedError
from nufilt_jax.engine.walk import Walk

SMALL = 5000  # bytes of a window: three of the towers' layers


def replace(file, other):
    shutil.copy(other, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


def cut(file, other):
    file.write_bytes(other.read_bytes()[:4000])


def remove(file, other):
    file.unlink()


WAYS = [replace, cut, remove]


@pytest.fixture
def meanwhile(monkeypatch):
    """Has something done before the cell of this number is merged, the task of which is in memory."""

    def arm(act, number):
        merge, seen = Walk._merge, []

        def merged(walk, *args):
            seen.append(args)
            if len(seen) == number:
                act()
            return merge(walk, *args)

        monkeypatch.setattr(Walk, "_merge", merged)
        return seen

    return arm


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gamma", "base"])
def test_what_changes_while_it_is_merged_is_refused(
    models, tmp_path, nufilt, command, in_windows, monkeypatch, meanwhile, way, name
):
    assert nufilt(*command(models, tmp_path / "whole")).code == 0
    in_windows(SMALL)
    out, file = tmp_path / "out", models / name / "model.safetensors"
    shutil.copy(file, tmp_path / "kept")
    seen = meanwhile(lambda: way(file, models / "delta" / "model.safetensors"), 4)  # alpha, of the second window
    result = nufilt(*command(models, out))
    assert (result.code, len(result.lines)) == (1, 1), result.err
    said = "was removed while it was merged" if way is remove else "has changed while it was merged: it had SHA-256"
    assert result.err.startswith(f"nufilt: {file}: {said}"), result.err
    assert f"restore it, and merge again; what is merged is kept in {out}.partial" in result.err
    assert not out.exists()
    monkeypatch.undo()
    in_windows(SMALL)
    shutil.copy(tmp_path / "kept", file)
    before, again = len(seen), meanwhile(lambda: None, 0)
    assert nufilt(*command(models, out)).code == 0
    assert len(again) < before + 3  # the first window is not merged again
    assert build.weight_bytes(out) == build.weight_bytes(tmp_path / "whole")


def test_what_is_touched_or_fetched_anew_is_merged(models, tmp_path, nufilt, command, meanwhile):
    def act():
        os.utime(models / "base" / "model.safetensors", (1, 1))
        replace(models / "gamma" / "model.safetensors", models / "gamma" / "model.safetensors")

    assert nufilt(*command(models, tmp_path / "whole")).code == 0
    meanwhile(act, 1)
    assert nufilt(*command(models, tmp_path / "out")).code == 0
    assert build.weight_bytes(tmp_path / "out") == build.weight_bytes(tmp_path / "whole")


def test_nothing_is_left_of_a_merge_that_had_kept_nothing(models, tmp_path, nufilt, command, meanwhile):
    base = models / "base" / "model.safetensors"
    meanwhile(lambda: replace(base, models / "delta" / "model.safetensors"), 1)
    result = nufilt(*command(models, tmp_path / "out", n=2))
    assert result.code == 1 and result.lines[0].endswith("(restore it, and merge again)"), result.err
    assert not (tmp_path / "out.partial").exists()


def test_a_base_that_changes_while_the_model_is_written_is_refused(models, tmp_path, nufilt, command, monkeypatch):
    base, write = models / "base" / "model.safetensors", run.write_checkpoint

    def written(*args, **how):
        replace(base, models / "delta" / "model.safetensors")
        write(*args, **how)

    monkeypatch.setattr(run, "write_checkpoint", written)
    result = nufilt(*command(models, tmp_path / "out"))
    assert (result.code, len(result.lines)) == (1, 1), result.err
    assert f"{base}: has changed while it was merged" in result.err and "what is merged is kept in" in result.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial" / "output").exists()


def test_a_base_of_which_the_header_alone_is_read_may_be_touched(models, tmp_path, nufilt, meanwhile):
    for name in ("alpha", "beta"):
        argv = ("extract", models / name, "--base", models / "base", "--rank", 2, "--out", tmp_path / name)
        assert nufilt(*argv).code == 0
    tasks = [part for name in ("alpha", "beta") for part in ("--task", f"{name}={tmp_path / name}")]
    argv = ("merge", "--base", models / "base", *tasks, "--output", "adapter", "--out", tmp_path / "out", *build.RANKS)
    meanwhile(lambda: os.utime(models / "base" / "model.safetensors", (1, 1)), 1)
    assert nufilt(*argv).code == 0


def test_what_changes_while_it_is_merged_in_memory_is_refused(models, monkeypatch):
    merged = loaded.merged_one_by_one

    def changed(*args):
        replace(models / "beta" / "model.safetensors", models / "delta" / "model.safetensors")
        return merged(*args)

    monkeypatch.setattr(loaded, "merged_one_by_one", changed)
    tasks = {name: models / name for name in ("alpha", "beta")}
    with pytest.raises(ChangedError, match="has changed while it was merged"):
        nufilt_jax.merge(models / "base", tasks, method="sum")
