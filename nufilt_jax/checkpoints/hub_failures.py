"""What may go wrong with the Hub, in one line each."""

import contextlib
import errno
from collections.abc import Iterator
from typing import cast

from nufilt_jax.errors import CheckpointError, Problem

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class UnreachableError(CheckpointError):
    """The Hub did not answer: what the cache holds may serve instead."""


@contextlib.contextmanager
def translated(source: str, revision: str | None) -> Iterator[None]:
    """As `distinguished`, where nothing may serve instead."""
    try:
        with distinguished(source, revision):
            yield
    except UnreachableError as error:
        raise CheckpointError(*error.problems) from None


@contextlib.contextmanager
def distinguished(source: str, revision: str | None) -> Iterator[None]:
    """Turns every failure of the Hub library into one line.

    Raises:
      UnreachableError: the Hub did not answer, or nothing can be kept of what it says.
      CheckpointError: it refused.
    """
    from huggingface_hub import errors

    try:
        yield
    except CheckpointError:
        raise
    except errors.GatedRepoError:
        fix = f"accept its terms at https://huggingface.co/{source} and log in with: hf auth login"
        raise CheckpointError(Problem(source, "is gated on the Hub", fix)) from None
    except errors.RepositoryNotFoundError:
        what = "there is no such folder, and the Hub has no such model, or it is private"
        raise CheckpointError(Problem(source, what, "check the name, or log in with: hf auth login")) from None
    except errors.RevisionNotFoundError:
        what = f"the Hub's model has no revision {revision!r}"
        raise CheckpointError(Problem(source, what, "check the part after @")) from None
    except _failures() as error:
        if isinstance(error, OSError) and (error.filename or error.errno in _NO_ROOM):
            told = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
            what = f"there is no such folder, and the Hub's cache cannot be used: {told}"
            fix = "set HF_HOME to a folder with room that can be written"
            raise UnreachableError(Problem(source, what, fix)) from None
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        what = f"there is no such folder, and the Hub could not be asked: {reason}"
        fix = "check the path and the network, or use --offline with a filled cache"
        raise UnreachableError(Problem(source, what, fix)) from None


def _failures() -> tuple[type[Exception], ...]:
    """What the Hub library lets through: errors of HTTP, OSError, and ValueError of a strange answer."""
    from huggingface_hub.errors import HfHubHTTPError

    # Named by its subclass: it is httpx's in one release and httpx2's in another.
    return (*cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__), OSError, ValueError)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keeps the Hub library's progress bars and hints off the terminal; the command line has its own."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    level, bars_off = hub_logging.get_verbosity(), are_progress_bars_disabled()
    hub_logging.set_verbosity_error()
    if not bars_off:
        disable_progress_bars()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if not bars_off:
            enable_progress_bars()
