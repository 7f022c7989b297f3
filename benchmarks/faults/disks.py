"""Disks that fail: at any call, with any room, without links or locks or free inodes; and the real command on them.

A failing merge must say so in one line, leave nothing or the whole model under its name, or what stood there before
where a task is added, and lose no step that was recorded; the same command on a sound disk must then give the bits of
an undisturbed merge, and leave nothing beside.
"""

import builtins
import contextlib
import errno
import fcntl
import io
import json
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
from nufilt_jax.output.place import RECIPE

FULL, LOST = errno.ENOSPC, errno.EACCES
ERRORS = {"full": FULL, "quota": errno.EDQUOT, "read-only": errno.EROFS, "permission lost": LOST, "broken": errno.EIO}
SIZES = [tenths / 10 for tenths in range(3, 51)]  # of a disk, in models
ROOMS = SIZES[:30:3]  # of a disk beside a finished merge, in models
INODES = range(4, 40, 3)
WORKS = ("merge", "add")
_PAGE = 4096  # bytes of a tmpfs that files share with no other
_FEWER = 4  # of the faults of a merge, every so manieth is tried on adding too
_REMOUNTS = 6  # instants of each work at which a disk becomes one to read alone
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
    """Models, and merges of them, or tasks added to a finished one, on disks that fail."""

    def __init__(self, root: Path, *, is_large: bool = False) -> None:
        self.root = root
        shape = _LARGE if is_large else {}
        models.write(root / "base", models.base_and_task(**shape)[0])
        for seed, name in enumerate(("a", "b")):
            models.write(root / name, models.base_and_task(**shape, seed=seed)[1])
        self.model_bytes = (root / "base" / "model.safetensors").stat().st_size
        self._begun = root / "begun" / "out"  # as deep as where it is copied to: its recipe tells of paths from there
        self._call(self._merge(self._begun, "a"))
        self.run(root / "sound")
        self._old, self._wanted = content(self._begun), content(root / "sound")
        sizes = [path.stat().st_size for path in self._begun.rglob("*")]
        self.begun_bytes = sum(-(-size // _PAGE) * _PAGE for size in sizes)

    def _merge(self, out: Path, *names: str) -> list[str]:
        tasks = [part for name in names for part in ("--task", f"{name}={self.root / name}")]
        return ["merge", "--base", str(self.root / "base"), *tasks, "--method", "sum", "--quiet", "--out", str(out)]

    def run(self, out: Path, work: str = "merge") -> tuple[int, list[str]]:
        """The exit status and the lines on stderr of the command."""
        if work == "merge":
            return self._call(self._merge(out, "a", "b"))
        return self._call(["add", str(out), "--task", f"b={self.root / 'b'}", "--quiet"])

    @staticmethod
    def _call(argv: list[str]) -> tuple[int, list[str]]:
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            status = main(argv)
        return status, [line for line in err.getvalue().splitlines() if not line.startswith("nufilt: warning: ")]

    @contextlib.contextmanager
    def _disk(self, work: str, options: str = "") -> Iterator[Path]:
        """A folder as the command finds it, or with options for `mount` a disk of its own."""
        folder = self.root / "disk"
        folder.mkdir()
        try:
            if options:
                _mount(options, folder)
            if work == "add":
                shutil.copytree(self._begun, folder / "out")
            yield folder
        finally:
            if os.path.ismount(folder):
                subprocess.run(["umount", str(folder)], check=True)
            shutil.rmtree(folder)

    def n_calls(self, work: str = "merge") -> int:
        """How many calls write, in a merge that nothing disturbs."""
        with self._disk(work) as folder:
            calls = FailingCalls(folder, FULL, float("inf"))
            with calls.armed():
                status, lines = self.run(folder / "out", work)
        if status:
            raise SystemExit(f"a merge that nothing disturbs ends with {lines}")
        return calls.count

    def failing_at(self, first: int, error: int, work: str = "merge") -> Outcome:
        """A merge of which every write fails from one on."""
        with self._disk(work) as folder:
            with FailingCalls(folder, error, first).armed():
                status, lines = self.run(folder / "out", work)
            return self.judged(folder, status, lines, work)

    def without(self, owner: Any, name: str, error: int) -> Outcome:
        """A merge on a file system that lacks something: the call always fails."""

        def fails(*_: Any, **__: Any) -> None:
            raise OSError(error, os.strerror(error))

        with self._disk("merge") as folder:
            with mock.patch.object(owner, name, fails):
                status, lines = self.run(folder / "out")
            return self.judged(folder, status, lines)

    def with_clock_back(self) -> Outcome:
        """A merge during which the clock is set back by a day, again and again."""
        now, began = time.time, time.time()
        with self._disk("merge") as folder:
            with mock.patch.object(time, "time", lambda: 2 * began - now() - 86400):
                status, lines = self.run(folder / "out")
            return self.judged(folder, status, lines)

    def on_tmpfs(self, options: str, work: str = "merge") -> Outcome:
        """A merge on a small disk, which is then made large.

        A task is added on a disk with so much room beside the merge that stands there.
        """
        large = f"remount,size={20 * self.model_bytes + _MORE},nr_inodes=100000"
        with self._disk(work, options) as folder:
            status, lines = self.run(folder / "out", work)
            if status:
                _mount(large, folder)
            return self.judged(folder, status, lines, work)

    def on_read_only(self, first: int, work: str = "merge") -> Outcome:
        """A merge that was stopped half way, on a disk that was then mounted anew, to be read alone.

        The system mounts no disk so while a file on it is open to be written, as the lock of a run is.
        """
        with self._disk(work, f"size={_MORE}") as folder:
            with FailingCalls(folder, FULL, first).armed():
                self.run(folder / "out", work)
            _mount("remount,ro", folder)
            status, lines = self.run(folder / "out", work)
            _mount("remount,rw", folder)
            return self.judged(folder, status, lines, work)

    def judged(self, folder: Path, status: int, lines: list[str], work: str = "merge") -> Outcome:
        """What is wrong with a merge that met a fault, and with the same command after it."""
        faults, out = [], folder / "out"
        if status not in (0, 1) or len(lines) != status or not all(line.startswith("nufilt: ") for line in lines):
            faults.append(f"status {status} and the lines {lines}")
        if any("failed unforeseen" in line for line in lines):
            faults.append(f"not foreseen: {lines}")
        found = standing(out)
        if found not in [self._wanted, {}, *[self._old] * (work == "add")]:
            faults.append("half a model under its name")
        elif status == 0 and found != self._wanted:
            faults.append("it ended well without the model")
        kept = 0 if found == self._wanted else recorded(out)
        again, more = self.run(out, work)
        if again or more:
            faults.append(f"the same command then ends with status {again} and {more}")
        else:
            faults += differences(out, self._wanted, kept)
        return Outcome(status != 0, lines[0] if lines else "", "; ".join(faults))


def recorded(out: Path) -> int:
    """How many steps are on disk: of the merge under way, or else of the finished one."""
    for folder in (out.with_name(f"{out.name}.partial"), out):
        if (folder / RECIPE).is_file():
            return len(json.loads((folder / RECIPE).read_text())["steps"])
    return 0


def differences(out: Path, wanted: dict[str, bytes], kept: int) -> list[str]:
    """What is wrong with a merge that ended well after a fault.

    Args:
      out: its folder.
      wanted: the content of an undisturbed one.
      kept: steps that were on disk before, of which none may have been done again.
    """
    if content(out) != wanted:
        return ["the same command then gives other bits"]
    steps = json.loads((out / RECIPE).read_text())["steps"]
    resumed = sum(step["resumed"] for step in steps)
    faults = [f"{kept} steps were recorded, and {resumed} resumed"] if resumed < kept else []
    left = sorted(path.name for path in out.parent.iterdir() if path.name != out.name)
    return [*faults, *([f"{', '.join(left)} stay beside it"] if left else [])]


def standing(out: Path) -> dict[str, bytes]:
    """The content of an output, which is empty where there is none."""
    try:
        return content(out) if out.exists() else {}
    except OSError as error:
        return {"unreadable": str(error).encode()}


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
    """Every fault, or every so manieth of a kind, by kind; of those on adding a task, fewer."""
    small = Merges(root / "small")
    for work, name in zip(WORKS, ("", ", adding a task"), strict=True):
        n_calls, step = small.n_calls(work), every * (1 if work == "merge" else _FEWER)
        for kind, error in ERRORS.items():
            for first in range(1, n_calls + 1, step * (1 if error == FULL else 5)):
                yield f"{kind}, from a call on{name}", small.failing_at(first, error, work)
    yield "no links", small.without(os, "link", errno.EPERM)
    yield "no locks", small.without(fcntl, "flock", errno.EOPNOTSUPP)
    yield "a clock set back", small.with_clock_back()
    if not can_mount(root):
        return
    large = Merges(root / "large", is_large=True)
    for size in SIZES[::every]:
        yield f"a disk of {size:g} models", large.on_tmpfs(f"size={int(size * large.model_bytes)}")
    for size in ROOMS[::every]:
        options = f"size={large.begun_bytes + int(size * large.model_bytes)}"
        yield f"a disk of {size:g} models more, adding a task", large.on_tmpfs(options, "add")
    for inodes in INODES[::every]:
        yield f"a disk of {inodes} inodes", small.on_tmpfs(f"size={_MORE},nr_inodes={inodes}")
    for work, name in zip(WORKS, ("", ", adding a task"), strict=True):
        n_calls = small.n_calls(work)
        for first in range(1, n_calls + 1, every * max(1, n_calls // _REMOUNTS)):
            yield f"mounted anew to be read alone{name}", small.on_read_only(first, work)
