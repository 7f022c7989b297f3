"""--plan refuses a place in which the merge itself could not be written, and writes nothing there."""

import os
import shutil

import model_builders as build
import pytest

FAST = ("--method", "sum")


def both(nufilt, argv):
    """The refusals of the plan and of the merge."""
    plan, merge = nufilt(*argv, "--plan"), nufilt(*argv)
    assert (plan.code, len(plan.lines), merge.code, len(merge.lines)) == (1, 1, 1, 1), (plan.err, merge.err)
    return plan.err, merge.err


def test_below_a_file(shared_models, tmp_path, nufilt, command):
    (tmp_path / "file").write_text("")
    plan, _ = both(nufilt, command(shared_models, tmp_path / "file" / "deep" / "out", *FAST))
    assert plan.startswith(f"nufilt: {tmp_path / 'file'}: cannot be written: Not a directory (")


@pytest.mark.parametrize(("flag", "what"), [(0, "Permission denied"), (os.ST_RDONLY, "Read-only file system")])
def test_in_a_folder_in_which_nothing_can_be_made(shared_models, tmp_path, nufilt, command, monkeypatch, flag, what):
    disk = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may do everything
    monkeypatch.setattr(os, "statvfs", lambda path: type("Disk", (), {"f_flag": disk.f_flag & ~os.ST_RDONLY | flag}))
    plan = nufilt(*command(shared_models, tmp_path / "deep" / "out", *FAST, "--plan"))
    assert (plan.code, len(plan.lines)) == (1, 1)
    assert plan.err.startswith(f"nufilt: {tmp_path}: cannot be written: {what} (")


@pytest.mark.parametrize("kind", ["a file", "a folder"])
def test_beside_something_that_is_of_no_merge(shared_models, tmp_path, nufilt, command, kind):
    partial = tmp_path / "out.partial"
    if kind == "a folder":
        partial.mkdir()
        partial /= "thesis.tex"
    partial.write_text("mine")
    before = build.snapshot(tmp_path)
    plan, merge = both(nufilt, command(shared_models, tmp_path / "out", *FAST))
    assert plan == merge and "out.partial: is not of a merge: nothing is overwritten" in plan
    assert build.snapshot(tmp_path) == before


def test_on_a_disk_without_room_for_the_state(shared_models, tmp_path, nufilt, command, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    argv = command(shared_models, tmp_path / "out", *FAST)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        plan, merge = (line.split(": ")[2] for line in both(nufilt, argv))
        assert plan == merge and "MB and 0.0 MB are free (free some space" in plan
        # What a killed run has left there goes first.
        staging = tmp_path / "out.partial" / "output"
        staging.mkdir(parents=True)
        (staging / "model.safetensors").write_bytes(bytes(1 << 20))
        assert nufilt(*argv, "--plan").code == 0
    assert nufilt(*argv).code == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert [nufilt(*argv, *options).code for options in ((), ("--plan",))] == [0, 0]  # nothing is left to do


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_a_task_for_a_merge_whose_arrays_are_damaged(shared_models, tmp_path, nufilt, command, damage):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, *FAST, n=2)).code == 0
    for path in (out / "state").glob("*/arrays.safetensors"):
        path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1])
    before = build.snapshot(tmp_path)
    plan, merge = both(nufilt, ["merge", "--add", out, "--task", f"delta={shared_models / 'delta'}"])
    assert plan == merge and "the state of the merge cannot be read: " in plan
    assert plan.endswith("(merge again from the start)\n")
    assert build.snapshot(tmp_path) == before


def test_a_merge_under_way_whose_arrays_are_cut_off(shared_models, tmp_path, nufilt, command, stop_before):
    """The merge refuses them and gives them up, so that the same command then begins anew."""
    argv = command(shared_models, tmp_path / "out", *FAST)
    go_on = stop_before("gamma")
    assert nufilt(*argv).code == 130
    go_on()
    for path in (tmp_path / "out.partial" / "state").glob("*/arrays.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    plan, merge = both(nufilt, argv)
    assert plan == merge and not (tmp_path / "out.partial").exists()
    assert nufilt(*argv).code == 0
