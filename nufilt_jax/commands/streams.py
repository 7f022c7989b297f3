"""stdout and stderr as a program should treat them: what cannot be shown costs no work."""

import codecs
import contextlib
import os
from collections.abc import Iterator
from typing import Any, TextIO

from nufilt_jax.errors import NufiltError, Problem

_ESCAPING = "nufilt-escape"


class ShowError(NufiltError, OSError):
    """What was asked for is done, and cannot be told."""


class ReaderGoneError(ShowError):
    """Whoever reads stdout has had enough, as `head` has; nothing is wrong."""


class Output:
    """A text stream; attributes that are not here are the stream's own.

    A failure of stdout is a `ShowError`; one of stderr, where progress and warnings go, is passed over.
    """

    def __init__(self, stream: TextIO | None, *, is_result: bool) -> None:
        """Takes a stream.

        Args:
          stream: None if the process was started without.
          is_result: whether it is stdout.
        """
        self._stream, self._is_result = stream, is_result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with contextlib.suppress(ValueError):  # it is closed
            return self._stream is not None and self._stream.isatty()
        return False

    def write(self, text: str) -> int:
        """Writes, and returns the number of characters."""
        if self._stream is not None:
            with self._forgiving(self._stream):
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what waits."""
        if self._stream is not None:
            with self._forgiving(self._stream):
                self._stream.flush()

    @contextlib.contextmanager
    def _forgiving(self, stream: TextIO) -> Iterator[None]:
        try:
            yield
        except ValueError:  # it is closed
            self._stream = None
        except OSError as error:
            self._stream = None
            _silence(stream)
            if isinstance(error, BrokenPipeError) and self._is_result:
                raise ReaderGoneError from error
            if self._is_result:
                what = f"cannot be written: {error.strerror or error}"
                raise ShowError(Problem("stdout", what, "the work itself is done")) from error


def _silence(stream: TextIO) -> None:
    """Lets what still waits in a broken stream go nowhere: at its end the interpreter would try again, and complain."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler: bytes that are no text as they are, and other characters escaped."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start]
    if "\udc80" <= lost <= "\udcff":
        return bytes([ord(lost) - 0xDC00]), error.start + 1
    return lost.encode("ascii", "backslashreplace"), error.start + 1


@contextlib.contextmanager
def escaping(*streams: TextIO | None) -> Iterator[None]:
    """Lets streams write any text, whatever their encoding: what it lacks is escaped, and paths keep their bytes."""
    codecs.register_error(_ESCAPING, _escape)
    changed = [(stream, stream.errors) for stream in streams if stream is not None and hasattr(stream, "reconfigure")]
    for stream, _ in changed:
        stream.reconfigure(errors=_ESCAPING)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for stream, errors in changed:
            with contextlib.suppress(ValueError, OSError):  # it is closed, or cannot be written
                stream.reconfigure(errors=errors)  # pyright: ignore[reportAttributeAccessIssue]
