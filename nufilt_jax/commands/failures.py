"""What nobody foresaw: one line for the user, and the traceback in a file beside the output, for a report."""

import contextlib
import importlib.metadata
import os
import platform
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from nufilt_jax import __version__
from nufilt_jax.errors import NufiltError, Problem

_LIBRARIES = ("jax", "jaxlib", "numpy", "orbax-checkpoint", "safetensors")
_PACKAGE = Path(__file__).parents[1]
_JAX_SETTINGS = "jax/_src/config.py"  # where JAX reads its variables, when it is imported
_NO_MEMORY = "RESOURCE_EXHAUSTED"  # so XLA begins to say that a device has no room


class UnexpectedError(NufiltError, RuntimeError):
    """A failure that nobody foresaw; its traceback is kept for a report."""


def traceback_beside(out: Path) -> Path:
    """The file that holds the traceback of a failed run: `DIR.traceback`, beside its output folder."""
    return out.with_name(f"{out.name}.traceback")


@contextlib.contextmanager
def traceback_kept(log: Path) -> Iterator[None]:
    """Keeps the traceback of what fails unforeseen in a file, which the next run that ends well removes.

    Raises:
      UnexpectedError: in the place of what was not foreseen.
    """
    try:
        yield
    except NufiltError:
        raise
    except Exception as error:
        raise UnexpectedError(unforeseen(error, log if _write(log, error) else None)) from error
    with contextlib.suppress(OSError):
        log.unlink(missing_ok=True)


def unforeseen(error: BaseException, log: Path | None = None) -> Problem:
    """What to tell of a failure that is no `NufiltError`.

    Args:
      error: as it was raised.
      log: the file that holds its traceback; None if there is none.
    """
    kept = f"the traceback is in {log}" if log else ""
    if isinstance(error, FileNotFoundError) and error.filename is None and not _has_place():
        return Problem("the working directory", "was deleted", _joined("change to one that is there", kept))
    if isinstance(error, OSError):
        return Problem(str(error.filename or "system"), error.strerror or str(error), kept)
    if variable := _unread_by_jax(error):
        what = f"JAX refuses the value {os.environ[variable]!r}"
        return Problem(variable, what, "correct or unset it")
    reason = next((line for line in map(str.strip, str(error).splitlines()) if line), "")
    if isinstance(error, MemoryError):
        return Problem("memory", "is exhausted", _joined("close other programs, or use a larger machine", kept))
    if reason.startswith(_NO_MEMORY):
        fix = "give a smaller --max-memory, or use a larger device"
        return Problem("device memory", f"is exhausted: {reason}", _joined(fix, kept))
    what = f"{type(error).__name__}" + (f": {reason}" if reason else "")
    return Problem(_place(error), f"failed unforeseen: {what}", _joined(kept, "please report it"))


def _has_place() -> bool:
    """Whether the working directory is there."""
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


def _unread_by_jax(error: BaseException) -> str:
    """The variable of the environment whose value keeps JAX from being imported; empty if it is none.

    JAX names it, or its setting, or of a number the value alone.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, ValueError) or not Path(frames[-1].filename).as_posix().endswith(_JAX_SETTINGS):
        return ""
    named = [name for name in os.environ if re.search(rf"\b{name}\b", str(error), re.IGNORECASE)]
    meant = [name for name, value in os.environ.items() if name.startswith("JAX_") and repr(value) in str(error)]
    return next(iter(named + meant), "")


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _place(error: BaseException) -> str:
    """Where in this package a failure was met, innermost first: `engine/walk.py:93`."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    if not ours:
        return "nufilt"
    return f"{Path(ours[-1].filename).relative_to(_PACKAGE).as_posix()}:{ours[-1].lineno}"


def _write(log: Path, error: BaseException) -> bool:
    """Whether the traceback could be kept."""
    told = [
        f"nufilt_jax {__version__}, Python {platform.python_version()}, {platform.platform()}",
        *(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES),
        f"command: {sys.argv}",
        "".join(traceback.format_exception(error)),
    ]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("\n".join(told), encoding="utf-8", errors="backslashreplace")
    except (OSError, ValueError):
        with contextlib.suppress(OSError):  # what a full disk has taken of it
            log.unlink(missing_ok=True)
        return False
    return True
