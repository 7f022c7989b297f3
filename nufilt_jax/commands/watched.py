"""A process whose end by JAX's coordination service is told in one line.

When a process of a run dies, that service ends all others from a thread of its own, with pages of its log and SIGABRT;
no exception is raised, and a callback in Python cannot be given (its argument has no Python type). So the work is done
in a fork, and this process waits to say how it ended.
"""

import contextlib
import os
import re
import select
import signal
import sys
import threading
import time
from types import FrameType

from nufilt_jax.commands.interrupt import ending
from nufilt_jax.commands.streams import Output
from nufilt_jax.engine.uninterrupted import COMPILING, SIGNALS
from nufilt_jax.errors import NufiltError, Problem

_FATAL = "the JAX distributed service detected fatal errors"
_COMING = "CoordinationService/RegisterTask"  # the call by which a process joins the others
_SILENT = re.compile(r"stopped sending heartbeats\):((?:\s+\d+)+)")
_AGAIN = "what was written is kept: start all processes again with the same command; their number may be another"
WAITING = 300  # seconds that the processes that have come wait for the others
_GRACE = 60  # seconds in which a process that is to end by then has to
_COME = b"\0"  # no log holds it
_MOST = 1 << 20  # bytes of foreign text that are kept in mind


class _Fork:
    is_here = False  # whether this process is the one that works
    told = -1  # where it writes what is no text for Python's stderr


class OtherDiedError(NufiltError, RuntimeError):
    """Another process of the run is not there, or not any more."""


def worked_elsewhere() -> int | None:
    """Forks: gives None to the process that is to do the work, and its exit status to the one that has waited for it.

    Before threads are started, and so before JAX is imported. What Python writes on stderr goes there; what libraries
    write, when the work has ended, unless it is that another process is gone.

    Raises:
      OtherDiedError: JAX's service has ended the work, as another process died or did not come.
    """
    if not hasattr(os, "fork") or sys.stdout is None or sys.stderr is None:
        return None  # what JAX says is seen then
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    told, foreign = os.pipe()
    alive, life = os.pipe()
    worker = os.fork()
    if worker:
        os.close(foreign)
        os.close(alive)
        try:
            return _ending(*_waited(worker, told))
        finally:
            os.close(told)
            os.close(life)
    os.close(told)
    os.close(life)
    _Fork.is_here = True
    os.setpgid(0, 0)  # Ctrl-C comes from the process that waits, and once
    _redirect(foreign)
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    return None


def have_come() -> None:
    """Tells the process that waits that no other one is waited for any more."""
    if _Fork.is_here:
        os.write(_Fork.told, _COME)


def leave(status: int, *, is_own: bool) -> int:
    """Gives the exit status back, or ends the process with it at once.

    The process that works: what JAX has to say when it is taken down is of no use to anybody. And one whose own the
    command line is, that would stay for a compiler whose program nobody waits for any more.
    """
    is_compiling = any(thread.name == COMPILING for thread in threading.enumerate())
    if _Fork.is_here or (is_own and is_compiling):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    return status


def _redirect(foreign: int) -> None:
    """Python's stderr stays what it was; file descriptor 2, on which C++ writes, becomes another."""
    old = sys.stderr
    sys.stderr = open(os.dup(2), "w", encoding=old.encoding, errors=old.errors, buffering=1)  # noqa: SIM115
    os.dup2(foreign, 2)
    _Fork.told = foreign


def _end_with(alive: int) -> None:
    os.read(alive, 1)  # returns when the process that waits is gone
    os._exit(1)


def _waited(worker: int, told: int) -> tuple[int, str]:
    """The exit status of the process that works, as `os.waitstatus_to_exitcode` gives it, and what was said.

    JAX's service has been seen to end nothing: a process that still waits for others when all should have come, or
    that is there long after JAX has given up, is ended from here.

    A first signal is handed on, and a second one ends the work at once: JAX hears none while it waits for others.
    """
    struck: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        del frame
        struck.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, number if len(struck) == 1 else signal.SIGKILL)

    handlers = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        said = _heard(worker, told)
        status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if len(struck) > 1 and status == -signal.SIGKILL:
        return ending(struck[-1])
    return status, said.decode(errors="replace")


def _heard(worker: int, told: int) -> bytearray:
    """What the process that works says until it ends, or is ended: then with JAX's own words for it."""
    said, until, has_failed = bytearray(), time.monotonic() + WAITING + _GRACE, False
    while select.select([told], [], [], max(until - time.monotonic(), 0) if until else None)[0]:
        if not (chunk := os.read(told, 1 << 16)):
            return said
        if _COME in chunk:
            until = 0
        said += chunk.replace(_COME, b"")
        del said[:-_MOST]
        if not has_failed and _FATAL.encode() in said:
            until, has_failed = time.monotonic() + _GRACE, True
    os.kill(worker, signal.SIGKILL)
    return said if has_failed else bytearray(f"{_FATAL}: {_COMING}".encode())


def _ending(status: int, said: str) -> int:
    if status in (-signal.SIGABRT, -signal.SIGKILL) and _FATAL in said:
        raise OtherDiedError(_gone(said))
    if said:
        Output(sys.stderr, is_result=False).write(said)
    if status < 0:  # as it ended, so does this one
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _gone(said: str) -> Problem:
    if _COMING in said:
        what = f"not all processes have come within {WAITING} s"
        return Problem("--distributed", what, "start all of them, and let each reach the first one's HOST:PORT")
    found = _SILENT.search(said)
    gone = found[1].split() if found else ["0"]  # of the first one the others know at once: it is the service
    where = f"process {gone[0]}" if len(gone) == 1 else f"processes {', '.join(gone)}"
    return Problem(where, "died, or cannot be reached any more", _AGAIN)
