"""Merges ended by signals, at random instants and at every call that writes, and run again.

A run is a process forked from one that has everything imported: Python's start would take most of the time otherwise.
It says in a page of memory that both share what it is at, so that it is known what each signal struck. One that came
before the command had begun, or when it had ended, does not count, and another is sent.
"""

import contextlib
import functools
import mmap
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults import models
from benchmarks.faults.disks import WORKS, FailingCalls, content, differences, recorded, standing
from nufilt_jax.cli import main

KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP and SIGKILL")
STATUS = {"SIGTERM": 143, "SIGINT": 130}
METHODS = {"sum": (), "nufilt": ("--filter-rank", "2", "--adapter-rank", "2", "--task-rank", "1", "--steps", "5")}
PHASES = ("starting", "reading", "solving", "recording", "writing the state", "writing the model", "publishing")
PHASES += ("ending",)
BEFORE, AFTER = len(PHASES), len(PHASES) + 1  # of a process that has not begun the command, or has ended it
_PATIENCE = 120.0  # seconds that a run may take
_NOT_BEGUN = 99  # the status of a process that the signal reached before the command began
_DRAWS = 50  # signals that are sent at most until one strikes a run
_HOW = (
    "call",
    "call",
    "instant",
    "phase",
)  # a signal comes: at a call that writes, at any instant, soon after a phase began
_BRIEF = ("starting", "reading")  # of small models: an instant seldom falls into them
_SOON = 0.01  # seconds


class Outcome(NamedTuple):
    """What a signal did.

    Attributes:
      kind: of the signal.
      work: `merge`, or `add` to a finished one.
      where: of `PHASES`, what it struck; empty if it struck no run.
      finding: what is wrong; empty if nothing is.
      missed: how many signals before it struck none.
    """

    kind: str
    work: str
    where: str
    finding: str
    missed: int = 0


class Kills:
    """Models, and merges of them that are killed."""

    def __init__(self, root: Path, method: str) -> None:
        self.root, self.method = root, method
        base, task = models.base_and_task()
        models.write(root / "base", base)
        models.write(root / "a", task)
        models.write(root / "b", models.base_and_task(seed=1)[1])
        self._options = ("--method", method, *METHODS[method], "--quiet")
        self._page = mmap.mmap(-1, 2)  # what a run is at, and what it was at when it struck itself
        self._begun, self._sound = root / "begun" / "out", root / "sound" / "out"
        self._finish(self._merge(self._begun, "a"))
        self._finish(self._merge(self._sound, "a", "b"))
        self._old, self._wanted = content(self._begun), content(self._sound)
        # The second time, for the first compiles.
        self.seconds = {work: self._undisturbed(work)[0] for work in WORKS for _ in range(2)}
        self.calls = {work: self._undisturbed(work)[1] for work in WORKS}

    def _merge(self, out: Path, *tasks: str) -> list[str]:
        given = [part for name in tasks for part in ("--task", f"{name}={self.root / name}")]
        return ["merge", "--base", str(self.root / "base"), *given, "--out", str(out), *self._options]

    def _argv(self, work: str) -> list[str]:
        out = self.root / "disk" / "out"
        if work == "merge":
            return self._merge(out, "a", "b")
        return ["add", str(out), "--task", f"b={self.root / 'b'}", "--quiet"]

    def _undisturbed(self, work: str) -> tuple[float, int]:
        """Seconds of a run, and how many of its calls write."""
        with self._disk(work) as disk:
            begun = time.monotonic()
            self._finish(self._argv(work))
            seconds = time.monotonic() - begun
        with self._disk(work) as disk:
            told = disk.with_name("count")
            child = self._fork(self._argv(work), told)
            os.waitpid(child, 0)
            return seconds, int(told.read_text())

    @contextlib.contextmanager
    def _disk(self, work: str) -> Iterator[Path]:
        """The folder that a run writes to, as it finds it."""
        disk = self.root / "disk"
        shutil.rmtree(disk, ignore_errors=True)
        disk.mkdir()
        if work == "add":
            shutil.copytree(self._begun, disk / "out")
        yield disk

    def _fork(self, argv: list[str], told: Path, strike: tuple[int, int] | None = None) -> int:
        """Starts a run; with `strike`, it sends itself a signal at one of its calls that write."""
        self._page[0] = self._page[1] = BEFORE
        child = os.fork()
        if child:
            return child
        status = _NOT_BEGUN
        try:
            descriptor = os.open(told.with_name("stderr"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  which ends with the process
            calls = _Striking(self.root / "disk", self._page, strike)
            _tell_phases(self._page)
            with calls.armed():
                self._page[0] = 0
                status = main(argv)
                self._page[0] = AFTER
            if strike is None:
                told.write_text(str(calls.count))
            sys.stderr.flush()
        finally:
            os._exit(status)

    def _finish(self, argv: list[str]) -> None:
        child = self._fork(argv, self.root / "told")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            raise SystemExit(f"{' '.join(argv)} ended with status {status}: {(self.root / 'stderr').read_text()}")

    def kill(self, kind: str, work: str, rng: random.Random) -> Outcome:
        """One run that is ended while it works, at an instant or at a call, and run again."""
        for missed in range(_DRAWS):
            outcome = self._sent(kind, work, rng)
            if outcome.where or outcome.finding:
                return outcome._replace(missed=missed)
        return Outcome(kind, work, "", f"none of {_DRAWS} signals ended a run", _DRAWS)

    def _sent(self, kind: str, work: str, rng: random.Random) -> Outcome:
        how = rng.choice(_HOW)
        at_call = rng.randrange(self.calls[work]) + 1 if how == "call" else 0
        first = signal.SIGSTOP if kind == KINDS[3] else getattr(signal, kind)
        with self._disk(work) as disk:
            child = self._fork(self._argv(work), self.root / "told", (at_call, first) if at_call else None)
            if not at_call:
                if how == "phase":
                    self._await(child, PHASES.index(rng.choice(_BRIEF)))
                _wait(child, rng.random() * (_SOON if how == "phase" else self.seconds[work]))
                self._page[1] = self._page[0]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, first)
            status = self._end(child, kind)
            struck = self._page[1]
            if status == _NOT_BEGUN or struck == BEFORE:
                return Outcome(kind, work, "", "")
            finding = self._judged(disk, kind, work, status)
        return Outcome(kind, work, "" if status == 0 or struck == AFTER else PHASES[struck], finding)

    def _await(self, child: int, phase: int) -> None:
        """Waits until a run is at something, or over."""
        while self._page[0] != phase and not _is_over(child):
            pass

    def _end(self, child: int, kind: str) -> int:
        """Waits for a run that a signal has reached; one that is stopped is killed."""
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            found, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
            if found and os.WIFSTOPPED(status):
                os.kill(child, signal.SIGKILL)
            elif found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return 98

    def _told_lines(self) -> list[str]:
        lines = (self.root / "stderr").read_text(errors="replace").splitlines()
        return [line for line in lines if not line.startswith("nufilt: warning: ")]

    def _judged(self, disk: Path, kind: str, work: str, status: int) -> str:
        faults, lines = [], self._told_lines()
        may_be = {0, STATUS.get(kind, -signal.SIGKILL)}
        if kind == "SIGTERM":  # it strikes before the command has begun to listen, or when it has ended
            may_be.add(-signal.SIGTERM)
        if status not in may_be or len(lines) > (status > 0) or not all(x.startswith("nufilt: ") for x in lines):
            faults.append(f"status {status} and the lines {lines}")
        found = standing(disk / "out")
        if found not in [self._wanted, {}, *[self._old] * (work == "add")]:
            faults.append("half a model under its name")
        kept = 0 if found == self._wanted else recorded(disk / "out")
        child = self._fork(self._argv(work), self.root / "told")
        again = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        more = self._told_lines()
        if again or more:
            faults.append(f"the same command then ends with status {again} and the lines {more}")
        else:
            faults += differences(disk / "out", self._wanted, kept)
        return "; ".join(faults)


class _Striking(FailingCalls):
    """Sends this process a signal before one of its calls that write, and tells what it was at."""

    def __init__(self, root: Path, page: mmap.mmap, strike: tuple[int, int] | None) -> None:
        super().__init__(root, 0, float("inf"))
        self._page, self._at = page, strike

    def strike(self, path: object) -> None:
        """Counts a call; see above."""
        self.count += 1
        if self._at is not None and self.count == self._at[0]:
            self._page[1] = self._page[0]
            os.kill(os.getpid(), self._at[1])


def _tell_phases(page: mmap.mmap) -> None:
    """Makes this process write what it is at to a page: see `PHASES`."""
    from nufilt_jax.commands import merge
    from nufilt_jax.engine import run, walk
    from nufilt_jax.output.place import OutputPlace

    parts = {
        "reading": [(merge, "make_plan"), (merge, "inspect"), (walk.Walk, "go")],
        "solving": [(walk, "update")],
        "recording": [(OutputPlace, "record")],
        "writing the state": [(OutputPlace, "keep")],
        "writing the model": [(run, "_write_model")],
        "publishing": [(OutputPlace, "publish")],
    }
    for phase, places in parts.items():
        for owner, name in places:
            setattr(owner, name, _telling(getattr(owner, name), page, PHASES.index(phase)))


def _telling(function: Callable[..., Any], page: mmap.mmap, phase: int) -> Callable[..., Any]:
    last = PHASES.index("publishing")

    @functools.wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        before, page[0] = page[0], phase
        try:
            return function(*args, **options)
        finally:
            page[0] = PHASES.index("ending") if phase == last else before

    return called


def _wait(child: int, seconds: float) -> None:
    """Waits so long, or until the run is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not _is_over(child):
        time.sleep(0.001)


def _is_over(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def study(root: Path, n_kills: int, seed: int = 0) -> Iterator[Outcome]:
    """Runs so many merges that are killed: every kind of signal and work in turn, one in four by the method itself."""
    import jax  # noqa: F401  and what each run would import again; no backend is started before the fork

    import nufilt_jax.commands.app
    import nufilt_jax.commands.merge  # noqa: F401

    rng = random.Random(seed)
    merges = {method: Kills(root / method, method) for method in METHODS}
    for number in range(n_kills):
        method = "nufilt" if number % 4 == 3 else "sum"
        kind = KINDS[(number + number // 4) % len(KINDS)]
        yield merges[method].kill(kind, WORKS[number // 2 % 2], rng)


if __name__ == "__main__":
    import json

    for found in study(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):
        sys.stdout.write(json.dumps(found._asdict()) + "\n")
        sys.stdout.flush()
