"""Ctrl-C, and the signal by which schedulers end a job, end a run in order, wherever they strike."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_TOLD = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_GOES_ON = "; the same command again goes on after the last finished step"
_ANEW = "; the same command again begins anew"
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


class _Command:
    again = ""  # what the same one does again, once it is known which that is


class TerminatedError(KeyboardInterrupt):
    """The run was asked to end by SIGTERM; it ends as Ctrl-C ends it."""


def begins(*, goes_on: bool) -> None:
    """Says of the command of this process whether it keeps what it has done for the same command again."""
    _Command.again = _GOES_ON if goes_on else _ANEW


def interruption(error: KeyboardInterrupt) -> tuple[int, str]:
    """The exit status and the message of a run that was interrupted."""
    return ending(signal.SIGTERM if isinstance(error, TerminatedError) else signal.SIGINT)


def ending(number: int) -> tuple[int, str]:
    """The exit status and the message of a run that a signal ended."""
    return 128 + number, f"nufilt: {_TOLD[signal.Signals(number)]}{_Command.again}\n"


@contextlib.contextmanager
def orderly_interrupts() -> Iterator[None]:
    """Lets KeyboardInterrupt through where it is safe, and ends the process at once where it is not.

    Raised while a compiled module is imported it can abort the process, and raised in a callback (JAX has one in the
    garbage collector) it is printed and lost. Ending at once loses nothing: all files are written beside their place
    and renamed, and the system releases the lock.
    """
    _Command.again = ""
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _TOLD}
    if handlers[signal.SIGTERM] is not signal.SIG_DFL:  # somebody else's matter
        del handlers[signal.SIGTERM]
    hook = sys.unraisablehook

    def on_unraisable(lost: Any) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            _end(signal.SIGTERM if isinstance(lost.exc_value, TerminatedError) else signal.SIGINT)
        hook(lost)

    for number in handlers:
        signal.signal(number, _on_signal)
    sys.unraisablehook = on_unraisable
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def _on_signal(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end(number)
        frame = frame.f_back
    raise TerminatedError if number == signal.SIGTERM else KeyboardInterrupt


def _end(number: int) -> None:
    status, message = ending(number)
    with contextlib.suppress(OSError):
        stderr = sys.stderr.fileno()
        os.write(stderr, ((_SHOW_CURSOR if os.isatty(stderr) else "") + message).encode())
    os._exit(status)
