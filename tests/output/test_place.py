"""The lock of an output folder: one that writes, or several that read."""

import errno
import fcntl

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
