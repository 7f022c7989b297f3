"""Lines and documents on a console: what the tables of results and everything else need. Imports nothing heavy."""

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from rich.console import Console

MOST_COLUMNS = 80  # of a table, or of lines that are wrapped, however wide the terminal
_HEAD = 8  # characters of a line's first word, with the space behind it


def show_line(console: Console, line: str) -> None:
    """A line as it is: never wrapped, whatever the width, and free of markup."""
    console.out(line, highlight=False)


def show_wrapped(console: Console, line: str) -> None:
    """The same, wrapped between words on a terminal: `head    what it says`, with what follows under the latter."""
    width = min(console.width, MOST_COLUMNS) if console.is_terminal else 0
    how = {"subsequent_indent": " " * _HEAD, "break_long_words": False, "break_on_hyphens": False}
    for part in textwrap.wrap(line, max(width, 2 * _HEAD), **how) if width else [line]:
        show_line(console, part)


def show_json(console: Console, document: Mapping[str, Any]) -> None:
    """One JSON document on stdout, in ASCII: a terminal or pipe may know nothing else."""
    console.file.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
