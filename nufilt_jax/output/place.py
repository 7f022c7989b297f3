"""The place of an output folder: locked while in use, and never holding half a model."""

import contextlib
import dataclasses
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from nufilt_jax.checkpoints.writer import output_error
from nufilt_jax.durable import atomic_write, make_folder, move, sync, sync_tree
from nufilt_jax.errors import OutputError, Problem, raise_all
from nufilt_jax.output.documents import read_json, write_json
from nufilt_jax.output.hashes import folder_sha256
from nufilt_jax.output.links import carry_over, link_tree, remove
from nufilt_jax.output.recipe import Recipe
from nufilt_jax.output.state import Groups, StoredWindow, save_window, stored_windows

RECIPE = "nufilt.json"
FORECAST = "forecast.json"
CARD = "README.md"
STATE = "state"
REWRITTEN = (RECIPE, "evaluation.json", "accuracy_matrix.png")  # which other commands write anew: no digest is kept
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class OutputPlace:
    """An output folder `DIR`, and what stands beside it while a merge is under way.

    - `DIR.lock`: held by the run that writes, or by those that read; the system releases it when a run ends, however it
      ends.
    - `DIR.partial/`: the recipe, and in `state/` the windows as far as they are merged; `output/` while the model is
      written.
    - `DIR.partial/previous/`: for the instant of a swap, the folder that `DIR` was.
    """

    def __init__(self, out: str | Path) -> None:
        # Of a link, the folder behind it: a rename would replace the link itself.
        self.out = Path(os.path.realpath(out) if os.path.islink(out) else os.path.abspath(out))
        if not self.out.name:
            raise OutputError(Problem(str(out), "cannot be an output folder", "name a folder inside it"))
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.staging, self.state, self._previous = (self.partial / name for name in ("output", STATE, "previous"))
        self._lock = self.out.with_name(self.out.name + ".lock")
        self.warnings: list[str] = []  # of what publishing has found
        try:
            os.lstat(self.partial)  # the longest of the names
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                what = f"is too long a name: {self.partial.name} cannot stand beside it"
                raise OutputError(Problem(str(out), what, "choose a shorter one")) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock, and mends what a run killed in the middle of a swap left behind.

        What was made for a run that recorded nothing is removed again: parent folders, partial folder and lock.

        Raises:
          OutputError: another run holds it, or the folder's place cannot be written.
        """
        missing = [folder for folder in self.out.parents if not folder.exists()]
        try:
            make_folder(self.out.parent)
            lock = self._acquire()
        except OSError as error:
            raise output_error(self.out, error) from error
        with lock:
            try:
                self._recover()
                yield
            finally:
                self._tidy()
                self._lock.unlink(missing_ok=True)  # still held: who waits for it sees by its inode that it is gone
                for folder in missing:
                    with contextlib.suppress(OSError):  # it is used now
                        folder.rmdir()

    @contextlib.contextmanager
    def read_locked(self) -> Iterator[None]:
        """Holds the lock with others that read, so that no run writes; the folder's place may be one to read alone.

        Raises:
          OutputError: another run writes here.
        """
        with contextlib.ExitStack() as held:
            if (lock := self._acquire_for_reading()) is not None:
                held.enter_context(lock)
                held.callback(self._release, lock)
            yield

    def _acquire_for_reading(self) -> TextIO | None:
        """The lock file, locked; None where none can be had: then nobody can write either, or nobody can lock."""
        while True:
            try:
                lock = self._lock.open("r" if self._lock.exists() else "a")
            except FileNotFoundError:  # the last holder removed it meanwhile, or there is no such place
                if not self.out.parent.is_dir() or self._lock.is_symlink():  # into nowhere: no later try finds it
                    return None
                continue
            except OSError:
                return None
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock.fileno()), self._lock.stat()):
                    return lock
            except BlockingIOError as error:
                lock.close()
                raise OutputError(Problem(str(self.out), "another run is writing here", "wait for it")) from error
            except FileNotFoundError:
                pass
            except OSError:
                lock.close()
                return None
            lock.close()

    def _release(self, lock: TextIO) -> None:
        """Removes the lock file after the last that reads."""
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while others read
            self._lock.unlink(missing_ok=True)

    def _acquire(self) -> TextIO:
        """The lock file, locked. It may have been removed by the last holder while this run waited to open it."""
        while True:
            lock = self._lock.open("a")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock.fileno()), self._lock.stat()):
                    return lock
            except BlockingIOError as error:
                what = f"another run is {'reading' if _is_shared(lock) else 'writing'} here"
                lock.close()
                raise OutputError(Problem(str(self.out), what, "wait for it, or choose another --out")) from error
            except FileNotFoundError:
                pass
            except OSError as error:
                lock.close()
                if error.errno not in _NO_LOCKS:
                    raise
                what = "its file system knows no locks, which keep two runs apart"
                raise OutputError(Problem(str(self.out), what, "choose an --out on another one")) from error
            lock.close()

    def _recover(self) -> None:
        raise_all(OutputError, self.foreign())
        if self._previous.exists() and not self.out.exists():
            move(self._previous, self.out)
        for folder in (self._previous, self.staging):
            remove(folder)
        self._tidy()

    def _tidy(self) -> None:
        """Removes a partial folder in which nothing was recorded."""
        if self.partial.exists() and not (self.partial / RECIPE).exists() and not self.foreign():
            self.discard()

    def foreign(self) -> list[Problem]:
        """What stands in the place of the partial folder and is none, as far as names tell."""
        try:
            names = {path.name for path in self.partial.iterdir()}
        except NotADirectoryError:
            names = {""}  # of no part
        except OSError:  # there is none, or what may be wrong with it is told where it is written
            return []
        parts = {path.name for path in (self.state, self.staging, self._previous)}
        is_ours = RECIPE in names or all(name in parts or name.startswith(f".{RECIPE}.") for name in names)
        what = "is not of a merge: nothing is overwritten"
        return [] if is_ours else [Problem(str(self.partial), what, "move it, or choose another --out")]

    def discard(self) -> tuple[Problem, ...]:
        """Gives up the merge under way, and says what cannot be removed; what stands in the output folder stays."""
        with contextlib.suppress(OSError):
            (self.partial / RECIPE).unlink(missing_ok=True)  # first: without it, what remains counts for nothing
            sync(self.partial)
        try:
            remove(self.partial)
        except OutputError as error:
            return error.problems
        return ()

    def finished(self) -> dict[str, Any] | None:
        """The recipe of the merge that stands in the folder; None if there is no folder.

        Raises:
          OutputError: something else stands there.
        """
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return None
        if not (self.out / RECIPE).is_file():
            what = "exists and is not the output of a merge: nothing is overwritten"
            raise OutputError(Problem(str(self.out), what, "choose another --out, or remove it"))
        return read_json(self.out / RECIPE)

    def unfinished(self) -> dict[str, Any] | None:
        """The recipe of the merge under way beside the folder; None if there is none."""
        path = self.partial / RECIPE
        return read_json(path, "remove the folder to start over") if path.is_file() else None

    def windows(self) -> list[StoredWindow]:
        """The windows of the merge under way, and of the finished one that it continues.

        Raises:
          OutputError: what one tells of itself is damaged.
        """
        return [*stored_windows(self.out / STATE), *stored_windows(self.state)]

    @property
    def has_state(self) -> bool:
        """Whether a window of the merge under way is kept."""
        return self.state.is_dir() and any(self.state.iterdir())

    def record(self, recipe: Recipe) -> None:
        """Keeps a recipe of the merge under way.

        Raises:
          OutputError: it cannot be written.
        """
        try:
            make_folder(self.partial)
            write_json(self.partial / RECIPE, recipe.as_seen_from(self.out).to_json())
        except FileNotFoundError as error:  # it was there a moment ago
            raise OutputError(self._vanished()) from error
        except OSError as error:
            raise output_error(self.partial, error) from error

    def require_begun(self) -> None:
        """Requires that the merge under way is on disk, for a process that did not begin it.

        Raises:
          OutputError: its folder is not there, or not any more.
        """
        if not (self.partial / RECIPE).is_file():
            raise OutputError(self._vanished())

    def _vanished(self) -> Problem:
        what = "is not there, or not any more: the merge was begun in it"
        fix = "leave it alone; give several processes one folder on a file system that they share"
        return Problem(str(self.partial), what, fix)

    def keep(self, window: StoredWindow, arrays: Groups) -> StoredWindow:
        """Keeps a window of the merge under way, and gives it with its place.

        Raises:
          OutputError: it cannot be written.
        """
        try:
            return save_window(self.state, window, arrays)
        except FileNotFoundError as error:
            raise OutputError(self._vanished()) from error
        except OSError as error:
            raise output_error(self.partial, error) from error

    def publish(
        self, recipe: Recipe, forecast: Mapping[str, Any], card: str, windows: Iterable[StoredWindow]
    ) -> Recipe:
        """Completes the model in `staging` and puts it under the final name.

        Args:
          recipe: of the whole merge.
          forecast: of all its steps.
          card: the text of `README.md`.
          windows: all windows, as they stand on disk; numbered anew.

        Returns:
          The recipe, with the SHA-256 of the output's files.

        Raises:
          OutputError: something foreign has come to stand there, or the disk is full.
        """
        replaced = self.finished() or {}
        try:
            write_json(self.staging / FORECAST, dict(forecast))
            atomic_write(self.staging / CARD, card.encode())
            for number, window in enumerate(windows):
                # Linked, not moved: should the swap be cut short, the state still stands where it did.
                target = self.staging / STATE / window._replace(number=number).named()
                link_tree(window.folder, target)
            recipe = dataclasses.replace(recipe, files=folder_sha256(self.staging, without=REWRITTEN))
            write_json(self.staging / RECIPE, recipe.as_seen_from(self.out).to_json())
            self.warnings = carry_over(self.out, self.staging, replaced.get("files", {}), recipe.files)
            sync_tree(self.staging)
            if self.out.exists():
                move(self.out, self._previous)  # no folder that holds something is replaced by a rename
            move(self.staging, self.out)
        except OSError as error:
            raise output_error(self.out, error) from error
        self.warnings += map(str, self.discard())
        return recipe


def _is_shared(lock: TextIO) -> bool:
    """Whether those that hold a lock read alone."""
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
