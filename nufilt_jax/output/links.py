"""Files that get a second place: those of a state that is published, and what its user has put beside a merge.

And how the first place goes then, with nothing in it that has no other.
"""

import contextlib
import itertools
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from nufilt_jax.checkpoints.beside import OWN_FILES, OWN_FOLDERS
from nufilt_jax.checkpoints.folders import is_weight_file, unreadable
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


def carry_over(old: Path, new: Path, recorded: Mapping[str, str], written: Mapping[str, str]) -> list[str]:
    """Gives what a user has added to a merge a place in the folder that takes its place, unless that has such a file.

    Args:
      old: the folder of the merge.
      new: what will take its place.
      recorded: SHA-256 of the files that the merge wrote, by path; if it recorded none, nothing is told apart.
      written: of those in `new`. What was edited of the earlier ones, but for weights, is kept under another name.

    Returns:
      A warning that names them; none if nothing was edited.

    Raises:
      OutputError: a folder or such a file cannot be read, so that what is in it would be lost.
    """
    if not recorded:
        return []
    made, edited = list[str](), list[str]()
    for name in _listed(old):
        if name in recorded:
            edited += [name] if _is_edited(old / name, {recorded[name], written.get(name)}) else []
        elif os.path.lexists(new / name):
            continue
        elif _is_folder(old / name):
            (new / name).mkdir()
            made.append(name)
        else:
            _link(old / name, new / name)
    edited.sort()
    kept = [_kept_beside(old, new, name) for name in edited]
    for name in reversed(made):  # only now: nothing can be put into a folder that its user has protected
        _same_mode(old / name, new / name)
    if not edited:
        return []
    what = f"edited since the merge, and written anew: {', '.join(edited)}"
    return [str(Problem(str(old), what, f"yours is kept as {', '.join(kept)}"))]


def _is_edited(path: Path, known: Collection[str | None]) -> bool:
    try:
        return not is_weight_file(path.name) and path.is_file() and file_sha256(path) not in known
    except OSError as error:
        raise OutputError(unreadable(error, path)) from error


def _kept_beside(old: Path, new: Path, name: str) -> str:
    """Gives an edited file a place under the first name that is free, and tells which."""
    stem, suffix = os.path.splitext(name)
    names = (f"{stem}.old{number or ''}{suffix}" for number in itertools.count())
    kept = next(name for name in names if not os.path.lexists(new / name))
    _link(old / name, new / kept)
    return kept


def _listed(folder: Path) -> Iterator[str]:
    """Names of the files that are not true of one merge alone, and of all folders, each before what is in it."""

    def refuse(error: OSError) -> None:
        raise OutputError(unreadable(error, folder)) from error

    for path, folders, names in os.walk(folder, onerror=refuse):
        here = Path(path).relative_to(folder)
        folders[:] = [name for name in folders if here.parts or name not in OWN_FOLDERS]
        yield from ((here / name).as_posix() for name in folders)
        files = ((here / name).as_posix() for name in names if not _DRAFT.fullmatch(name))
        yield from (name for name in files if name not in OWN_FILES)


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
