"""Files that get a second place: those of a state that is published, and what its user has put beside a merge.

And how the first place goes then, with nothing in it that has no other.
"""

import contextlib
import itertools
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from nufilt_jax.checkpoints.beside import OWN_FILES, OWN_FOLDERS
from nufilt_jax.checkpoints.folders import unreadable
from nufilt_jax.errors import OutputError, Problem
from nufilt_jax.output.hashes import file_sha256

_DRAFT = re.compile(r"\..+\.[0-9a-f]{8}")  # what `durable.replacing` writes to


def link_tree(source: Path, target: Path) -> None:
    """Gives a folder's files a second place; `shutil.copytree` would tell of a full disk once for each."""
    for here, _, names in os.walk(source):
        there = target / Path(here).relative_to(source)
        there.mkdir(parents=True)
        for name in names:
            _link(Path(here, name), there / name)


def carry_over(old: Path, new: Path, recorded: Mapping[str, str], card: str) -> None:
    """Gives what a user has added to a merge a place in the folder that takes its place, unless that has such a file.

    Args:
      old: the folder of the merge.
      new: what will take its place.
      recorded: SHA-256 of the files that the merge wrote, by path; if it recorded none, nothing is told apart.
      card: name of the model card; one that was edited is kept under another name.

    Raises:
      OutputError: a folder cannot be listed, so that what is in it would be lost.
    """
    if not recorded:
        return
    made = list[str]()
    for name in _added(old, recorded):
        if os.path.lexists(new / name):
            continue
        if _is_folder(old / name):
            (new / name).mkdir()
            made.append(name)
        else:
            _link(old / name, new / name)
    for name in reversed(made):  # only now: nothing can be put into a folder that its user has protected
        _same_mode(old / name, new / name)
    if card in recorded and (old / card).is_file() and file_sha256(old / card) != recorded[card]:
        stem, suffix = os.path.splitext(card)
        names = (f"{stem}.old{number or ''}{suffix}" for number in itertools.count())
        _link(old / card, new / next(name for name in names if not os.path.lexists(new / name)))


def _added(folder: Path, recorded: Mapping[str, str]) -> Iterator[str]:
    """Names of the files that no command of this program wrote, and of all folders, each before what is in it."""

    def refuse(error: OSError) -> None:
        raise OutputError(unreadable(error, folder)) from error

    for path, folders, names in os.walk(folder, onerror=refuse):
        here = Path(path).relative_to(folder)
        folders[:] = [name for name in folders if here.parts or name not in OWN_FOLDERS]
        yield from ((here / name).as_posix() for name in folders)
        files = ((here / name).as_posix() for name in names if not _DRAFT.fullmatch(name))
        yield from (name for name in files if name not in OWN_FILES and name not in recorded)


def remove(folder: Path) -> None:
    """Removes a folder whose files have another place, those in folders that its user has protected too.

    A folder that cannot be listed stays: nothing of it was given another place.

    Raises:
      OutputError: something stays.
    """
    for here, _, _ in () if folder.is_symlink() else os.walk(folder):
        if not os.access(here, os.W_OK | os.X_OK):
            with contextlib.suppress(OSError):
                os.chmod(here, stat.S_IRWXU)
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        what = "cannot be removed: it holds what may not be listed or changed"
        raise OutputError(Problem(str(folder), what, "take out what is yours, and remove the rest"))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _same_mode(source: Path, target: Path) -> None:
    there, here = (stat.S_IMODE(path.stat().st_mode) for path in (source, target))
    if there != here:  # some file systems know none, and refuse to be asked
        target.chmod(there)


def _link(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
        return
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
