"""SHA-256 of the files of an output folder."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nufilt_jax.errors import Problem

_AT_ONCE = 4  # files; as many disks are kept busy


def file_sha256(path: Path) -> str:
    """Hex digest of a file, which is read in pieces.

    Raises:
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path, *, without: Iterable[str] = ()) -> dict[str, str]:
    """Hex digest of every file below a folder, by its path relative to it.

    Args:
      folder: where to look.
      without: names, relative to the folder, of files to leave out.
    """
    walked = (Path(here, name) for here, _, names in os.walk(folder) for name in names)
    names = sorted({path.relative_to(folder).as_posix() for path in walked}.difference(without))
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="hash") as pool:
        return dict(zip(names, pool.map(file_sha256, (folder / name for name in names)), strict=True))


def changed_files(folder: Path, recorded: Mapping[str, str]) -> list[Problem]:
    """The files of a folder that are missing, or are not what they were.

    Args:
      folder: where they stand.
      recorded: their digests by relative path, as `folder_sha256` gave them.
    """

    def compare(name: str) -> Problem | None:
        path = folder / name
        if not path.is_file():
            return Problem(str(path), "is missing", "restore it, or merge again")
        try:
            now = file_sha256(path)
        except OSError as error:
            return Problem(str(path), f"cannot be read: {error.strerror or error}", "check its permissions")
        if now == recorded[name]:
            return None
        return Problem(str(path), f"had SHA-256 {recorded[name]} and has {now}", "restore it, or merge again")

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="hash") as pool:
        return [problem for problem in pool.map(compare, sorted(recorded)) if problem is not None]
