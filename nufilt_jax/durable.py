"""Files and folders that a loss of power leaves whole: what they hold reaches the disk first, then their name."""

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

_SENT_AT_ONCE = 1 << 26  # bytes of a large file that the disk is told to begin with


def atomic_write(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    with replacing(path) as draft:
        draft.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a place beside `path` to write to; what is written there gets that name at the end, if all went well.

    The place is the caller's own, so that several may write the same file at the same time.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield draft
        sync(draft)
        move(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_pieces(file: IO[bytes], pieces: Iterable[bytes | memoryview]) -> None:
    """Writes pieces to a file. They go to the disk while more of them are made, not only once it is forced there."""
    sent = file.tell()
    for piece in pieces:
        file.write(piece)
        here = file.tell()
        if here - sent >= _SENT_AT_ONCE and hasattr(os, "posix_fadvise"):
            # To say that pages are not needed makes Linux begin to write them; none waits for that.
            os.posix_fadvise(file.fileno(), sent, here - sent, os.POSIX_FADV_DONTNEED)
            sent = here


def move(source: Path, target: Path) -> None:
    """Renames a file or folder whose content has reached the disk, for good."""
    os.replace(source, target)
    for folder in dict.fromkeys((target.parent, source.parent)):
        sync(folder)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, for good; it may exist."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync(folder.parent)


def sync_tree(folder: Path) -> None:
    """Forces a folder to the disk: its files, then its subfolders, then itself, then its name."""
    for here, _, names in os.walk(folder, topdown=False):
        for name in sorted(names):
            sync(Path(here, name))
        sync(Path(here))
    sync(folder.parent)


def sync(path: Path) -> None:
    """Forces a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
