"""What every script does alike: its arguments, its refusals, its progress."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from benchmarks.common.records import Json
from nufilt_jax.errors import NufiltError


class Parser(argparse.ArgumentParser):
    """Arguments of a benchmark; what is wrong with them is said in one line.

    Args:
      description: the script's own.
      out: name of its results file; empty if it writes one only where it is asked to.
    """

    def __init__(self, description: str | None, out: str) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        default = f"benchmarks/results/{out}" if out else "none"
        self.add_argument("--json", type=Path, metavar="OUT", help=f"results file (default: {default})")

    def error(self, message: str) -> NoReturn:
        """Says it and exits with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """What the package refuses is said, a line each, and ends the program with status 1."""
        try:
            yield
        except NufiltError as error:
            self.exit(1, "".join(f"{self.prog}: {problem}\n" for problem in error.problems))


def settings(options: argparse.Namespace) -> Json:
    """The options as the results file holds them: all but where it is written."""
    return {key: value for key, value in vars(options).items() if key != "json"}


def at_least(least: int) -> Callable[[str], int]:
    """Type of an argument: a whole number that is not below `least`."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return whole_number


def prepare_process() -> None:
    """Leaves the accelerator's memory to all contenders; before anything runs on it."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def say(text: str) -> None:
    """Progress, on stderr and on a terminal alone."""
    Console(stderr=True, highlight=False, quiet=not sys.stderr.isatty()).print(text, markup=False, soft_wrap=True)
