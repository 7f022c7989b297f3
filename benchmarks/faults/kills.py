"""Merges ended by signals, at random instants and at every call that writes, and run again.

A run is a process forked from one that has everything imported: Python's start would take most of the time otherwise.
"""

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.faults import models
from benchmarks.faults.disks import FailingCalls, content
from nufilt_jax.cli import main

KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP and SIGKILL")
STATUS = {"SIGTERM": 143, "SIGINT": 130}
METHODS = {"sum": (), "nufilt": ("--filter-rank", "2", "--adapter-rank", "2", "--task-rank", "1", "--steps", "5")}
WORKS = ("merge", "add")
_PATIENCE = 120.0  # seconds that a run may take
_NOT_BEGUN = 99  # the status of a process that the signal reached before the command began


class Outcome(NamedTuple):
    """What a signal did.

    Attributes:
      kind: of the signal.
      work: `merge`, or `add` to a finished one.
      where: the call at which it struck, or that it struck at an instant; empty if the run was over before.
      finding: what is wrong; empty if nothing is.
    """

    kind: str
    work: str
    where: str
    finding: str


class Kills:
    """Models, and merges of them that are killed."""

    def __init__(self, root: Path, method: str) -> None:
        self.root, self.method = root, method
        base, task = models.base_and_task()
        models.write(root / "base", base)
        models.write(root / "a", task)
        models.write(root / "b", models.base_and_task(seed=1)[1])
        self._options = ("--method", method, *METHODS[method], "--quiet")
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
        child = os.fork()
        if child:
            return child
        status = _NOT_BEGUN
        try:
            descriptor = os.open(told.with_name("stderr"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  which ends with the process
            calls = _Striking(self.root / "disk", told, strike)
            with calls.armed():
                status = main(argv)
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
        """One run that is ended, at an instant or at a call, and run again."""
        at_call = rng.randrange(self.calls[work]) + 1 if rng.random() < 0.6 else 0
        first = signal.SIGSTOP if kind == KINDS[3] else getattr(signal, kind)
        told = self.root / "told"
        with self._disk(work) as disk:
            told.write_text("")
            child = self._fork(self._argv(work), told, (at_call, first) if at_call else None)
            if not at_call:
                _wait(child, rng.random() * self.seconds[work])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, first)
            status = self._end(child, kind)
            where = told.read_text() if at_call else "at an instant"
            if status == _NOT_BEGUN:
                return self.kill(kind, work, rng)
            finding = self._judged(disk, kind, work, status)
        return Outcome(kind, work, "" if status == 0 else where, finding)

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
        if (disk / "out").exists() and content(disk / "out") not in [self._wanted, *[self._old] * (work == "add")]:
            faults.append("half a model under its name")
        child = self._fork(self._argv(work), self.root / "told")
        again = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        more = self._told_lines()
        if again or more:
            faults.append(f"the same command then ends with status {again} and the lines {more}")
        elif content(disk / "out") != self._wanted:
            faults.append("the same command then gives other bits")
        elif left := sorted(path.name for path in disk.iterdir() if path.name != "out"):
            faults.append(f"{', '.join(left)} stay beside it")
        return "; ".join(faults)


class _Striking(FailingCalls):
    """Sends this process a signal before one of its calls that write, and tells at which it did."""

    def __init__(self, root: Path, told: Path, strike: tuple[int, int] | None) -> None:
        super().__init__(root, 0, float("inf"))
        self._told, self._at = told, strike

    def strike(self, path: object) -> None:
        """Counts a call; see above."""
        self.count += 1
        if self._at is not None and self.count == self._at[0]:
            descriptor = os.open(self._told, os.O_WRONLY)
            os.write(descriptor, phase_of(str(path)).encode())
            os.close(descriptor)
            os.kill(os.getpid(), self._at[1])


def phase_of(path: str) -> str:
    """What a run does when it writes to a path."""
    inside = path.rpartition("/disk/")[2]
    phases = {"out.partial/output/state": "publishing", "out.partial/output": "writing the model"}
    phases |= {"out.partial/state": "writing the state", "out.partial": "recording"}
    return next((phase for start, phase in phases.items() if inside.startswith(start)), "taking the place")


def _wait(child: int, seconds: float) -> None:
    """Waits so long, or until the run is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.001)


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
