"""Files that get a second place: those of a state that is published, and what its user has put beside a merge."""

import itertools
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from nufilt_jax.checkpoints.beside import OWN_FILES, OWN_FOLDERS
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
    for path, folders, names in os.walk(folder):
        here = Path(path).relative_to(folder)
        folders[:] = [name for name in folders if here.parts or name not in OWN_FOLDERS]
        yield from ((here / name).as_posix() for name in folders)
        files = ((here / name).as_posix() for name in names if not _DRAFT.fullmatch(name))
        yield from (name for name in files if name not in OWN_FILES and name not in recorded)


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
