"""The exceptions of the library, to which commands add a few. Each carries its problems as one-line sentences."""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

__all__ = [
    "CheckpointError",
    "ConfigError",
    "EvaluationError",
    "MissingExtraError",
    "NotYetError",
    "NufiltError",
    "OutputError",
    "Problem",
    "SolveError",
    "UsageError",
]


def __dir__() -> list[str]:
    return list(__all__)


_OPTION = re.compile(r"(?<![\w/-])--[a-z][a-z0-9-]*")  # behind a slash, of a path
# How a sentence goes on whose subject is the argument.
_OF_SUBJECT = re.compile(r"(?:must|is|are|has|does|needs?|belongs?|means|cannot|may|was|goes|takes|stands|holds)\b")
_COMMANDS = {"--add": "nufilt add"}  # what no function has as an argument
# What moves a terminal's cursor, ends a line, or turns the direction of the text behind it.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_NUMBERS = re.compile(r"\[[\d, ]*\]|\d+(?:\.\d+)?(?:e[-+]?\d+)?")  # and shapes
_LONGEST = 1000  # characters of a name in a message: more than most systems allow of a path
_KEPT = 200  # of the start, and of the end, of a longer one
_LONGEST_SENTENCE = 20_000  # characters: a line each for the 100 files of the largest models
_MOST_ALIKE = 3  # problems that differ in the tensor alone are told one by one up to this number


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

    def in_python(self) -> str:
        """The same in Python's words: options by the names of arguments."""
        where, what = self.where, in_python(self.what)
        if where.startswith("--"):
            where = in_python(where)
            if _OF_SUBJECT.match(what) and not self.tensor:
                where, what = "", f"{where} {what}"
        return str(Problem(where, what, in_python(self.fix), self.tensor))

    def __str__(self) -> str:
        # One line, whatever a foreign message brought along; and no command to the terminal, whatever a name did.
        what, fix = (" ".join(filter(None, map(str.strip, x.splitlines()))) for x in (self.what, self.fix))
        what = what if len(what) <= _LONGEST_SENTENCE else shortened(what)
        parts = [printable(part) for part in (shortened(self.where), shortened(self.tensor), what) if part]
        return ": ".join(parts) + (f" ({printable(fix)})" if fix else "")


def printable(text: str) -> str:
    r"""A text as it may stand on a line of a terminal: what would move the cursor or turn the writing is escaped.

    >>> print(printable("a\nb\x1b[2J\u202e"))
    a\nb\x1b[2J\u202e
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def shortened(name: str) -> str:
    """A name, or of a very long one its ends."""
    return name if len(name) <= _LONGEST else f"{name[:_KEPT]}...{name[-_KEPT:]}"


def summarised(problems: Sequence[Problem]) -> list[Problem]:
    """The problems to tell: one cause over many tensors of a file, or many files of a folder, once with the count.

    >>> for problem in summarised([Problem("m.safetensors", "is cut off", "", f"w{n}") for n in range(13)]):
    ...     print(problem)
    m.safetensors: w0 and 12 more: is cut off
    """
    whats: dict[str, str] = {}  # a damaged file may have a fault per tensor, of which a few differ
    causes = [_cause(problem, whats) for problem in problems]
    sizes = Counter(causes)
    told, seen = [], set[tuple[str, ...]]()
    for problem, cause in zip(problems, causes, strict=True):
        if sizes[cause] <= _MOST_ALIKE:
            told.append(problem)
        elif cause not in seen:
            seen.add(cause)
            name = "tensor" if problem.tensor else "where"
            more = f"{shortened(getattr(problem, name))} and {sizes[cause] - 1} more"
            told.append(problem._replace(**{name: more}))
    return told


def _cause(problem: Problem, whats: dict[str, str]) -> tuple[str, ...]:
    """What problems of one cause share: they may differ in numbers, as of bytes."""
    what = whats.get(problem.what)
    if what is None:
        what = whats[problem.what] = _NUMBERS.sub("#", problem.what)
    if problem.tensor:
        return problem.where, "", what, problem.fix
    folder = os.path.dirname(problem.where)  # an option is in none, and each is told
    return (folder, "files", what, problem.fix) if folder else (problem.where, problem.what, what, problem.fix)


def in_python(text: str) -> str:
    """A sentence in Python's words: options by the names of arguments.

    >>> in_python("--filter-rank: no effect (leave out --strict, or continue it with --add)")
    'filter_rank: no effect (leave out strict, or continue it with nufilt add)'
    """
    return _OPTION.sub(lambda found: _COMMANDS.get(found[0]) or found[0].removeprefix("--").replace("-", "_"), text)


class NufiltError(Exception):
    """Base of all errors of this package; `problems` lists everything found, not only the first."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(problem.in_python() for problem in summarised(self.problems))


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
    """What is asked for is not here yet: a method that learns from examples, on a model without a forward pass."""


def raise_all(error: type[NufiltError], problems: Iterable[Problem]) -> None:
    """Raises `error` with all `problems` at once, or returns if there are none."""
    if found := tuple(problems):
        raise error(*found)


class _Told(Problem):
    """A problem, and the kind of error that told of it."""

    kind: type[NufiltError] | None = None


def of_kind(error: type[NufiltError], problems: Iterable[Problem]) -> list[Problem]:
    """The problems, marked as what that error tells of, for `error_of`; what has a kind keeps it."""
    public = next(kind for kind in error.__mro__ if kind.__module__ == __name__)
    return [problem if _kind(problem) else _marked(problem, public) for problem in problems]


def _marked(problem: Problem, kind: type[NufiltError]) -> Problem:
    told = _Told(*problem)
    told.kind = kind
    return told


def _kind(problem: Problem) -> type[NufiltError] | None:
    return problem.kind if isinstance(problem, _Told) else None


def error_of(problems: Iterable[Problem]) -> NufiltError:
    """The error that tells of all problems, `NufiltError` itself if they are of several kinds; each is told once.

    An option's is a `ConfigError` where nothing else is known.
    """
    found = tuple(dict.fromkeys(problems))
    kinds = {_kind(problem) or (ConfigError if problem.where.startswith("--") else NufiltError) for problem in found}
    return (kinds.pop() if len(kinds) == 1 else NufiltError)(*found)


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
        problems += of_kind(type(error), error.problems)
