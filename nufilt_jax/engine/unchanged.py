"""Whether the weight files that a merge reads are still those whose hashes its recipe tells."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from nufilt_jax.checkpoints import Checkpoint
from nufilt_jax.errors import CheckpointError, Problem, raise_all
from nufilt_jax.output.hashes import file_sha256

_FIX = "restore it, and merge again"


class ChangedError(CheckpointError):
    """A weight file is not what it was when the merge began; what is merged by then is sound."""


class HashedFiles:
    """Weight files as they were when they were hashed, before a run reads them again."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, ...], str]] = {}

    def add(self, path: Path, stamp: tuple[int, ...], sha256: str) -> None:
        """Notes a file.

        Args:
          path: of the file.
          stamp: `stamp_of` it, taken before it was hashed.
          sha256: hex digest.
        """
        self._known[path] = stamp, sha256

    @contextlib.contextmanager
    def required(self, *checkpoints: Checkpoint) -> Iterator[None]:
        """Requires that what the block reads of some models is what was hashed.

        Raises:
          ChangedError: a file is gone, or its bytes are others.
        """
        try:
            yield
        except (OSError, ValueError):  # a file that is written anew may be too short, or not there
            self._require(checkpoints)
            raise
        self._require(checkpoints)

    def _require(self, checkpoints: Iterable[Checkpoint]) -> None:
        files = dict.fromkeys(path for checkpoint in checkpoints for path in checkpoint.weight_files)
        raise_all(ChangedError, (problem for path in files for problem in self._problems(path)))

    def _problems(self, path: Path) -> Iterator[Problem]:
        if path not in self._known:  # the base of an adapter, of which no number is read
            return
        stamp, then = self._known[path]
        try:
            if (new := stamp_of(path)) == stamp:
                return
            now = file_sha256(path)
        except FileNotFoundError:
            yield Problem(str(path), "was removed while it was merged", _FIX)
            return
        if now == then:  # touched, or fetched anew: the stamp alone is another
            self._known[path] = new, then
            return
        yield Problem(str(path), f"has changed while it was merged: it had SHA-256 {then} and has {now}", _FIX)


def stamp_of(path: Path) -> tuple[int, ...]:
    """What tells a file from one that was put in its place or written over it, without reading it."""
    found = path.stat()  # behind a link, as the Hub's cache has them
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
