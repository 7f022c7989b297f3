"""Ctrl-C and SIGTERM wait while memory is between two states."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts a Ctrl-C or SIGTERM off until the end of the context; a second one is not put off.

    A program that writes the new D over the old cannot be stopped half way and leave either.
    """
    if threading.current_thread() is not threading.main_thread():  # which gets no signals
        yield
        return
    handlers = {int(number): handler for number in _SIGNALS if callable(handler := signal.getsignal(number))}
    caught: list[tuple[int, FrameType | None]] = []

    def put_off(number: int, frame: FrameType | None) -> None:
        if caught:
            handlers[number](number, frame)
        caught.append((number, frame))

    for number in handlers:
        signal.signal(number, put_off)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if caught:
        number, frame = caught[0]
        handlers[number](number, frame)
