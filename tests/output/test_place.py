"""The lock of an output folder: one that writes, or several that read; and what is removed beside it."""

import errno
import fcntl
import subprocess
import sys

import pytest

from nufilt_jax.errors import OutputError
from nufilt_jax.output.place import OutputPlace


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_the_last_that_reads_removes_the_lock(out):
    lock = out.with_name("out.lock")
    with OutputPlace(out).read_locked():
        with OutputPlace(out).read_locked():
            assert lock.is_file()
        assert lock.is_file()
        with (
            pytest.raises(OutputError, match=r"out: another run is reading here \(wait for it"),
            OutputPlace(out).locked(),
        ):
            pass
    assert not lock.exists()
    with OutputPlace(out).locked():
        for lock_of in (OutputPlace.locked, OutputPlace.read_locked):
            with (
                pytest.raises(OutputError, match=r"out: another run is writing here \(wait for it"),
                lock_of(OutputPlace(out)),
            ):
                pass
    assert not lock.exists()


def test_a_lock_that_a_killed_run_left_is_taken(out):
    out.with_name("out.lock").touch()
    with OutputPlace(out).read_locked():
        pass
    assert not out.with_name("out.lock").exists()


def test_what_can_only_be_read_is_read(out, monkeypatch):
    monkeypatch.setattr("pathlib.Path.open", fails(errno.EROFS))
    with OutputPlace(out).read_locked():
        pass


def test_a_lock_that_leads_into_nowhere_is_not_waited_for(out):
    out.with_name("out.lock").symlink_to(out.parent / "none" / "lock")
    with OutputPlace(out).read_locked():
        pass
    assert not (out.parent / "none").exists()


def test_a_file_system_without_locks_is_read(out, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fails(errno.ENOLCK))
    with OutputPlace(out).read_locked():
        pass


def test_a_place_that_is_not_there_is_not_made(tmp_path):
    with OutputPlace(tmp_path / "none" / "out").read_locked():
        pass
    assert not list(tmp_path.iterdir())


def fails(number):
    def fail(*_, **__):
        raise OSError(number, "fails")

    return fail


def test_a_foreign_folder_in_the_place_of_the_partial_one_is_left_alone(out):
    foreign = out.with_name("out.partial")
    (foreign / "output").mkdir(parents=True)
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"out\.partial: is not of a merge"), OutputPlace(out).locked():
        pass
    assert (foreign / "notes.txt").read_text() == "mine" and (foreign / "output").is_dir()
    (foreign / "notes.txt").unlink()  # what is left has the names of ours
    with OutputPlace(out).locked():
        pass
    assert not foreign.exists()


def test_places_that_can_be_none(tmp_path):
    with pytest.raises(OutputError, match="/: cannot be an output folder"):
        OutputPlace("/")
    with pytest.raises(OutputError, match=r"is too long a name: o+\.partial cannot stand beside it"):
        OutputPlace(tmp_path / ("o" * 250))
    (tmp_path / "mine").write_text("")
    with pytest.raises(OutputError, match="exists and is not the output of a merge: nothing is overwritten"):
        OutputPlace(tmp_path).finished()


# A program that is bound by permissions, whoever runs it: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
BOUND = """
import ctypes, os, sys
for capability in (1, 2):
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""
RECOVER = """
import sys
from nufilt_jax.output.place import OutputPlace
with OutputPlace(sys.argv[1]).locked():
    pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities")
def test_what_a_user_has_protected_goes_with_the_earlier_folder(out):
    """But for what cannot be listed, as an earlier version may have left it behind: the only place it has."""
    previous = out.with_name("out.partial") / "previous"
    modes = {"mine/deep": 0o555, "mine": 0o555, "private": 0o000}
    for name in modes:
        (previous / name).mkdir(parents=True, exist_ok=True)
        (previous / name / "notes.txt").write_text("mine")
    for name, mode in modes.items():
        (previous / name).chmod(mode)

    def recover():
        return subprocess.run([sys.executable, "-c", BOUND, RECOVER, out], capture_output=True, text=True, check=False)

    assert (
        recover()
        .stderr.splitlines()[-1]
        .endswith(
            f"{previous}: cannot be removed: it holds what may not be listed or changed "
            "(take out what is yours, and remove the rest)"
        )
    )
    assert [path.name for path in previous.iterdir()] == ["private"]
    (previous / "private").chmod(0o555)
    assert (previous / "private" / "notes.txt").read_text() == "mine"
    assert recover().returncode == 0
    assert not previous.parent.exists() and out.is_dir()
