"""Ctrl-C and SIGTERM wait while memory is between two states."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # by which a user or a scheduler ends a run in order
COMPILING = "compile"  # name of threads for which a process that has nothing else to do need not stay
# Seconds within which a second SIGTERM is the first one's echo: a scheduler strikes all processes of a job, and the one
# that waits for this one hands on what it got.
_ECHO = 1.0


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts a Ctrl-C or SIGTERM off until the end of the context; a second one is not put off, but for an echo.

    A program that writes the new D over the old cannot be stopped half way and leave either.
    """
    if threading.current_thread() is not threading.main_thread():  # which gets no signals
        yield
        return
    # No function stands there where a signal is ignored, or kills at once: that stays as it is.
    handlers = {int(number): handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    caught: list[tuple[int, FrameType | None, float]] = []

    def put_off(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        is_echo = caught and number == caught[-1][0] == signal.SIGTERM and now - caught[-1][2] < _ECHO
        if caught and not is_echo:
            handlers[number](number, frame)
        caught.append((number, frame, now))

    for number in handlers:
        signal.signal(number, put_off)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)  # before what was caught is handed on: that may raise
    if caught:
        number, frame, _ = caught[0]
        handlers[number](number, frame)
