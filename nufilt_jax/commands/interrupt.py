"""Ctrl-C ends a run in order, wherever it strikes."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

INTERRUPTED = 130
MESSAGE = "nufilt: interrupted; the same command again goes on after the last finished step\n"
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


@contextlib.contextmanager
def orderly_interrupts() -> Iterator[None]:
    """Lets KeyboardInterrupt through where it is safe, and ends the process at once where it is not.

    Raised while a compiled module is imported it can abort the process, and raised in a callback (JAX has one in the
    garbage collector) it is printed and lost. Ending at once loses nothing: all files are written beside their place
    and renamed, and the system releases the lock.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook

    def on_unraisable(lost: Any) -> None:
        if lost.exc_type is KeyboardInterrupt:
            _end()
        hook(lost)

    signal.signal(signal.SIGINT, _on_interrupt)
    sys.unraisablehook = on_unraisable
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        sys.unraisablehook = hook


def _on_interrupt(_: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end()
        frame = frame.f_back
    raise KeyboardInterrupt


def _end() -> None:
    with contextlib.suppress(OSError):
        os.write(2, ((_SHOW_CURSOR if os.isatty(2) else "") + MESSAGE).encode())
    os._exit(INTERRUPTED)
