"""Disks that fail: at any call, with any room, without links or locks or free inodes; and the real command on them.

A failing merge must say so in one line, leave nothing or the whole model under its name, and lose no step that was
recorded; the same command on a sound disk must then give the bits of an undisturbed merge, and leave nothing beside.
"""

import builtins
import contextlib
import errno
import fcntl
import io
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.faults import models
from nufilt_jax.cli import main

FULL, LOST = errno.ENOSPC, errno.EACCES
ERRORS = {"full": FULL, "quota": errno.EDQUOT, "read-only": errno.EROFS, "permission lost": LOST, "broken": errno.EIO}
SIZES = [tenths / 10 for tenths in range(3, 51)]  # of a disk, in models
INODES = range(4, 40, 3)
_LARGE = {"size": 128, "n_layers": 8}  # 2 MB: what else is written is little beside it
_MORE = 50_000_000  # bytes of a disk that is large enough
_CALLS = ("fsync", "mkdir", "replace", "link", "sendfile", "posix_fallocate")


class Outcome(NamedTuple):
    """What one fault did: whether it struck the merge, its line, and what is wrong; empty if nothing is."""

    struck: bool
    line: str
    finding: str


class FailingCalls:
    """Lets the calls that write below a folder fail from a given one on; counts them."""

    def __init__(self, root: Path, error: int, first: float) -> None:
        self._root, self._error, self._first = str(root), error, first
        self.count = 0

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Counts calls, and fails them, until the end of the context."""
        with contextlib.ExitStack() as patches:
            for name in _CALLS:
                patches.enter_context(mock.patch.object(os, name, self._counted(getattr(os, name), name)))
            opened = self._opened(io.open)
            patches.enter_context(mock.patch.object(io, "open", opened))
            patches.enter_context(mock.patch.object(builtins, "open", opened))
            yield

    def strike(self, path: object) -> None:
        """Counts a call, which fails if it is late enough."""
        self.count += 1
        if self.count >= self._first:
            raise OSError(self._error, os.strerror(self._error), path)

    def _is_below(self, path: object) -> bool:
        if isinstance(path, int):
            with contextlib.suppress(OSError):
                path = os.readlink(f"/proc/self/fd/{path}")
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(self._root)

    def _counted(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            if self._is_below(args[0]):
                self.strike(args[0] if not isinstance(args[0], int) else None)
            return function(*args, **options)

        return called

    def _opened(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            writes = set(mode) & set("wax+") and self._is_below(path)
            if writes:
                self.strike(path)
            file = function(path, mode, *args, **options)
            return _FailingFile(file, self) if writes else file

        return called


class _FailingFile:
    """A file whose writes may fail."""

    def __init__(self, file: Any, calls: FailingCalls) -> None:
        self._file, self._calls = file, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_FailingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        self._calls.strike(self._file.name)
        return self._file.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)


class Merges:
    """Models, and merges of them onto disks that fail."""

    def __init__(self, root: Path, *, is_large: bool = False) -> None:
        self.root = root
        sizes = _LARGE if is_large else {}
        models.write(root / "base", models.base_and_task(**sizes)[0])
        for seed, name in enumerate(("a", "b")):
            models.write(root / name, models.base_and_task(**sizes, seed=seed)[1])
        self.model_bytes = (root / "base" / "model.safetensors").stat().st_size
        tasks = ("--task", f"a={root / 'a'}", "--task", f"b={root / 'b'}")
        self._argv = ["merge", "--base", str(root / "base"), *tasks, "--method", "sum", "--quiet"]
        self.run(root / "sound")
        self._wanted = content(root / "sound")

    def run(self, out: Path) -> tuple[int, list[str]]:
        """The exit status and the lines on stderr of the command."""
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            status = main([*self._argv, "--out", str(out)])
        return status, [line for line in err.getvalue().splitlines() if not line.startswith("nufilt: warning: ")]

    def n_calls(self) -> int:
        """How many calls write, in a merge that nothing disturbs."""
        calls = FailingCalls(self.root / "count", FULL, float("inf"))
        with calls.armed():
            self.run(self.root / "count" / "out")
        shutil.rmtree(self.root / "count")
        return calls.count

    def failing_at(self, first: int, error: int) -> Outcome:
        """A merge of which every write fails from one on."""
        folder = self.root / "disk"
        folder.mkdir()
        calls = FailingCalls(folder, error, first)
        try:
            with calls.armed():
                status, lines = self.run(folder / "out")
            return self._judged(folder, status, lines)
        finally:
            shutil.rmtree(folder)

    def without(self, owner: Any, name: str, error: int) -> Outcome:
        """A merge on a file system that lacks something: the call always fails."""

        def fails(*_: Any, **__: Any) -> None:
            raise OSError(error, os.strerror(error))

        folder = self.root / "disk"
        folder.mkdir()
        try:
            with mock.patch.object(owner, name, fails):
                status, lines = self.run(folder / "out")
            return self._judged(folder, status, lines)
        finally:
            shutil.rmtree(folder)

    def with_clock_back(self) -> Outcome:
        """A merge during which the clock is set back by a day, again and again."""
        folder, now, began = self.root / "disk", time.time, time.time()
        folder.mkdir()
        try:
            with mock.patch.object(time, "time", lambda: 2 * began - now() - 86400):
                status, lines = self.run(folder / "out")
            return self._judged(folder, status, lines)
        finally:
            shutil.rmtree(folder)

    def on_tmpfs(self, options: str) -> Outcome:
        """A merge on a small disk, which is then made large."""
        folder = self.root / "disk"
        folder.mkdir()
        _mount(f"{options}", folder)
        try:
            status, lines = self.run(folder / "out")
            if status:
                _mount(f"remount,size={20 * self.model_bytes + _MORE},nr_inodes=100000", folder)
            return self._judged(folder, status, lines)
        finally:
            subprocess.run(["umount", str(folder)], check=True)
            folder.rmdir()

    def _judged(self, folder: Path, status: int, lines: list[str]) -> Outcome:
        """What is wrong with a merge that met a fault, and with the same command after it."""
        faults = []
        if status not in (0, 1) or len(lines) != status or not all(line.startswith("nufilt: ") for line in lines):
            faults.append(f"status {status} and the lines {lines}")
        if any("failed unforeseen" in line for line in lines):
            faults.append(f"not foreseen: {lines}")
        if (folder / "out").exists() and content(folder / "out") != self._wanted:
            faults.append("half a model under its name")
        again, more = self.run(folder / "out")
        if again or more:
            faults.append(f"the same command then ends with status {again} and {more}")
        elif content(folder / "out") != self._wanted:
            faults.append("the same command then gives other bits")
        elif left := sorted(path.name for path in folder.iterdir() if path.name != "out"):
            faults.append(f"{', '.join(left)} stay beside it")
        return Outcome(status != 0, lines[0] if lines else "", "; ".join(faults))


def _mount(options: str, folder: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)


def can_mount(root: Path) -> bool:
    """Whether this user may mount small disks."""
    folder = root / "probe"
    folder.mkdir(parents=True)
    try:
        _mount("size=1m", folder)
    except (OSError, subprocess.CalledProcessError):
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


def content(out: Path) -> dict[str, bytes]:
    """The files whose bytes depend on the merge alone, and neither on time nor place."""
    return {name: (out / name).read_bytes() for name in ("model.safetensors", "forecast.json", "config.json")} | {
        "state": (out / "state" / "window-0000" / "arrays.safetensors").read_bytes()
    }


def study(root: Path, every: int = 1) -> Iterator[tuple[str, Outcome]]:
    """Every fault, or every so manieth of a kind, by kind."""
    small = Merges(root / "small")
    n_calls = small.n_calls()
    for kind, error in ERRORS.items():
        for first in range(1, n_calls + 1, every * (1 if error == FULL else 5)):
            yield f"{kind}, from a call on", small.failing_at(first, error)
    yield "no links", small.without(os, "link", errno.EPERM)
    yield "no locks", small.without(fcntl, "flock", errno.EOPNOTSUPP)
    yield "a clock set back", small.with_clock_back()
    if not can_mount(root):
        return
    large = Merges(root / "large", is_large=True)
    for size in SIZES[::every]:
        yield f"a disk of {size:g} models", large.on_tmpfs(f"size={int(size * large.model_bytes)}")
    for inodes in INODES[::every]:
        yield f"a disk of {inodes} inodes", small.on_tmpfs(f"size={_MORE},nr_inodes={inodes}")
