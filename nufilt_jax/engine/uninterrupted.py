"""Ctrl-C waits while memory is between two states."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts a Ctrl-C off until the end of the context; a second one is not put off.

    A program that writes the new D over the old cannot be stopped half way and leave either.
    """
    if threading.current_thread() is not threading.main_thread():  # which gets no signals
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    caught: list[tuple[int, FrameType | None]] = []

    def put_off(number: int, frame: FrameType | None) -> None:
        if caught and callable(handler):
            handler(number, frame)
        caught.append((number, frame))

    signal.signal(signal.SIGINT, put_off)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if caught and callable(handler):
        handler(*caught[0])
