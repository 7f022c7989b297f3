"""A folder that is watched call by call, and what of it would be left if the power failed after any of them.

A file has the content that it had at its last fsync, and is empty before the first. Of the names made, renamed and
removed since their folder's last fsync, the disk may have taken any: none, all, the first ones however many, each alone
and all but each are tried.
A rename is one change, as in every file system with a journal, and is safe when both its folders have been synced.
"""

import contextlib
import os
import shutil
import stat
from pathlib import Path
from typing import NamedTuple


class Change(NamedTuple):
    """Of names: `(folder, name, what it stands for)`, None where it is removed."""

    names: tuple
    is_rename: bool
    folders: frozenset  # still to be synced


class Instant(NamedTuple):
    """Between two calls: names and contents on the disk, and the changes of names that may be there too."""

    call: str
    names: dict
    contents: dict
    pending: tuple

    def crashes(self):
        """Every state tried of names, and the contents."""
        changes = self.pending
        picks = [(), changes, *((one,) for one in changes), *(changes[:n] for n in range(2, len(changes)))]
        picks += [tuple(other for other in changes if other is not one) for one in changes]
        for pick in dict.fromkeys(picks):
            names = {folder: dict(found) for folder, found in self.names.items()}
            for folder, name, target in (row for change in pick for row in change.names):
                names.setdefault(folder, {})[name] = target
            yield names, self.contents


def key(names, contents):
    """Of what a crash leaves, to see that it was looked at before."""
    folders = frozenset((folder, frozenset(found.items())) for folder, found in names.items())
    return folders, frozenset(contents.items())


class Disk:
    """Watches one folder; `instants` has an entry for every call that reached the system, and one for the end."""

    def __init__(self, root):
        self.root, self.instants = Path(root), []
        self._ids, self._is_folder, self._count = {}, {}, 0
        self._live, self._names, self._contents, self._pending = {}, {}, {}, []
        self._observe()
        self._names = {folder: dict(found) for folder, found in self._live.items()}  # what is there already is safe
        self._contents, self._pending = {key: path.read_bytes() for key, path in self._files().items()}, []

    @contextlib.contextmanager
    def watching(self, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", self._watched(os.fsync, "fsync"))
            for owner, name in [(os, "replace"), (os, "rename"), (os, "unlink"), (os, "link"), (shutil, "rmtree")]:
                patch.setattr(owner, name, self._watched(getattr(owner, name), name))
            yield
        self.mark("end")

    def mark(self, call):
        """Notes what a loss of power would leave now."""
        self._observe()
        names = {folder: dict(found) for folder, found in self._names.items()}
        self.instants.append(Instant(call, names, dict(self._contents), tuple(self._pending)))

    def _watched(self, function, call):
        is_busy = []

        def called(*args, **options):
            if is_busy or not self.root.exists():  # rmtree unlinks
                return function(*args, **options)
            self.mark(call)
            is_busy.append(1)
            try:
                result = function(*args, **options)
            finally:
                is_busy.pop()
            if call == "fsync":
                self._sync(os.fstat(args[0]))
            else:
                self._observe(is_rename=call in ("replace", "rename"))
            return result

        return called

    def _sync(self, status):
        key = self._ids.get(status.st_ino)
        if not stat.S_ISDIR(status.st_mode):
            self._contents[key] = self._files()[key].read_bytes()
            return
        pending, self._pending = self._pending, []
        for change in pending:
            if change.folders - {key}:
                self._pending.append(change._replace(folders=change.folders - {key}))
                continue
            for folder, name, target in change.names:
                self._names.setdefault(folder, {})[name] = target

    def _files(self):
        walked = (Path(here, name) for here, _, names in os.walk(self.root) for name in names)
        return {self._ids[path.stat().st_ino]: path for path in walked if path.stat().st_ino in self._ids}

    def _observe(self, is_rename=False):
        """Takes in what was done to names since the last time."""
        walked = {self.root.stat().st_ino: {}}
        for here, folders, names in os.walk(self.root):
            found = {name: (Path(here, name).stat().st_ino, name in folders) for name in (*folders, *names)}
            walked[Path(here).stat().st_ino] = found
        present = {*walked, *(inode for found in walked.values() for inode, _ in found.values())}
        for inode in [inode for inode in self._ids if inode not in present]:
            del self._ids[inode]  # the number may come again, for something else
        for inode in present - self._ids.keys():
            self._count += 1
            self._ids[inode] = self._count
            self._is_folder[self._count] = inode in walked
        live = {self._ids[here]: {n: self._ids[i] for n, (i, _) in found.items()} for here, found in walked.items()}
        rows = [
            (folder, name, live.get(folder, {}).get(name))
            for folder in self._live.keys() | live.keys()
            for name in self._live.get(folder, {}).keys() | live.get(folder, {}).keys()
            if self._live.get(folder, {}).get(name) != live.get(folder, {}).get(name)
        ]
        if rows:
            changes = [tuple(rows)] if is_rename else [(row,) for row in rows]
            self._pending += [Change(c, is_rename, frozenset(folder for folder, _, _ in c)) for c in changes]
        self._live = live

    def restore(self, names, contents, to):
        """Makes a folder as one crash would leave it."""
        self._restore(self._ids[self.root.stat().st_ino], names, contents, Path(to))

    def _restore(self, folder, names, contents, to):
        to.mkdir()
        for name, key in names.get(folder, {}).items():
            if key is None:
                continue
            if self._is_folder[key]:
                self._restore(key, names, contents, to / name)
            else:
                (to / name).write_bytes(contents.get(key, b""))
