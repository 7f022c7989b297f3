"""Every exception a user can meet. Each carries its problems as one-line sentences."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")


class Problem(NamedTuple):
    """One thing that is wrong with the input, and what to do about it.

    Attributes:
      where: the file, folder or command-line option at fault.
      what: what is wrong, with both values where two things disagree.
      fix: what the user can do about it; empty if the sentence above says it.
      tensor: the tensor's name as it stands in the file, if one is at fault.
    """

    where: str
    what: str
    fix: str = ""
    tensor: str = ""

    def __str__(self) -> str:
        parts = [part for part in (self.where, self.tensor, self.what) if part]
        line = ": ".join(parts) + (f" ({self.fix})" if self.fix else "")
        # One line, whatever a foreign message brought along; and no command to the terminal, whatever a name did.
        line = " ".join(part.strip() for part in line.splitlines() if part.strip())
        return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", line)


class NufiltError(Exception):
    """Base of all errors of this package; `problems` lists everything found, not only the first."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


class ConfigError(NufiltError, ValueError):
    """A setting is unknown, out of range or does not fit the others."""


class UsageError(NufiltError, ValueError):
    """The options do not add up to a command."""


class CheckpointError(NufiltError, ValueError):
    """A checkpoint cannot be read, or does not fit its partners."""


class OutputError(NufiltError, OSError):
    """The output folder cannot be used: it is locked, foreign, full, or holds another merge."""


class SolveError(NufiltError, ArithmeticError):
    """A layer's solution is not finite."""


class EvaluationError(NufiltError, ValueError):
    """A model cannot be evaluated; what is merged is kept."""


class MissingExtraError(NufiltError, ImportError):
    """An optional dependency is needed and not installed."""


class NotYetError(NufiltError, NotImplementedError):
    """The design has a place for this, and nothing stands there yet."""


def raise_all(error: type[NufiltError], problems: Iterable[Problem]) -> None:
    """Raises `error` with all `problems` at once, or returns if there are none."""
    if found := tuple(problems):
        raise error(*found)


@contextlib.contextmanager
def gathering(problems: list[Problem]) -> Iterator[None]:
    """Adds what the block refuses to `problems` instead of ending the search for more.

    Wrong usage is not gathered: what the command means is not known then.
    """
    try:
        yield
    except UsageError:
        raise
    except NufiltError as error:
        problems += error.problems
