"""A disk that is full or read-only: one line, and what was done is kept."""

import errno
import json
import os
import shutil

import model_builders as build
import pytest

FAST = ("--method", "sum")


def full(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_room_for_the_state(shared_models, tmp_path, nufilt, command, monkeypatch):
    argv = command(shared_models, tmp_path / "out", *FAST)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    result = nufilt(*argv)
    assert (result.code, len(result.lines)) == (1, 1)
    assert "0.0 MB are free" in result.err and "free some space" in result.err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert nufilt(*argv).code == 0


@pytest.mark.parametrize("fails", ["os.replace", "nufilt_jax.checkpoints.writer._write_shards"])
def test_disk_full_while_writing(shared_models, tmp_path, nufilt, command, monkeypatch, fails):
    argv = command(shared_models, tmp_path / "out", *FAST)
    with monkeypatch.context() as patch:
        patch.setattr(fails, full)
        result = nufilt(*argv)
    assert (result.code, len(result.lines)) == (1, 1), result.err
    assert result.err.startswith("nufilt: ") and "No space left on device" in result.err
    assert not (tmp_path / "out").exists()
    kept = fails != "os.replace"  # which is what records a step
    assert (tmp_path / "out.partial").exists() == kept
    again = nufilt(*argv, "--json")
    assert (again.code, all(step["resumed"] for step in again.json["steps"])) == (0, kept)


def test_place_that_cannot_be_written(shared_models, tmp_path, nufilt, command):
    (tmp_path / "file").write_text("")
    result = nufilt(*command(shared_models, tmp_path / "file" / "out", *FAST))
    assert (result.code, len(result.lines)) == (1, 1)
    assert str(tmp_path / "file") in result.err


def test_task_that_vanishes_in_the_middle(models, tmp_path, nufilt, command, monkeypatch):
    from nufilt_jax.engine import run

    record = run.OutputPlace.record

    def and_remove(place, recipe):
        record(place, recipe)
        shutil.rmtree(models / "beta", ignore_errors=True)

    monkeypatch.setattr(run.OutputPlace, "record", and_remove)
    result = nufilt(*command(models, tmp_path / "out", *FAST))
    assert (result.code, len(result.lines)) == (1, 1)
    assert result.err.startswith(f"nufilt: {models / 'beta' / 'model.safetensors'}: ")
    assert len(json.loads((tmp_path / "out.partial" / "nufilt.json").read_text())["steps"]) == 1
    monkeypatch.undo()
    build.write(models / "beta", build.fine_tuned(build.tower(0), 2))
    assert nufilt(*command(models, tmp_path / "out", *FAST)).code == 0


def test_quota(shared_models, tmp_path, nufilt, command, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full)
    result = nufilt(*command(shared_models, tmp_path / "out", *FAST))
    assert (result.code, len(result.lines)) == (1, 1)
    assert "No space left on device" in result.err
    assert not (tmp_path / "out").exists()


def test_cache_that_cannot_be_written(shared_models, tmp_path, finish, command):
    (tmp_path / "file").write_text("")
    environment = {"NUFILT_CACHE": str(tmp_path / "file")}
    argv = command(shared_models, tmp_path / "out", *FAST, "--json")
    result = finish("-m", "nufilt_jax.merge", *argv[1:], env=environment)
    assert (result.code, result.err) == (0, "")


def test_output_folder_behind_a_link(shared_models, tmp_path, nufilt, command):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    assert nufilt(*command(shared_models, tmp_path / "out", *FAST, n=2)).code == 0
    assert nufilt("add", tmp_path / "out", "--task", f"gamma={shared_models / 'gamma'}").code == 0
    assert (tmp_path / "out").is_symlink()
    assert len(json.loads((tmp_path / "disk" / "out" / "nufilt.json").read_text())["tasks"]) == 3


def test_damaged_partial_recipe(shared_models, tmp_path, nufilt, command):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "nufilt.json").write_text("{")
    before = build.snapshot(tmp_path)
    for options in ((), ("--plan",)):
        result = nufilt(*command(shared_models, tmp_path / "out", *FAST, *options))
        assert (result.code, len(result.lines)) == (1, 1)
        assert str(tmp_path / "out.partial" / "nufilt.json") in result.err
        assert build.snapshot(tmp_path) == before
