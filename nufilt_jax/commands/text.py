"""Lines and documents on a console: what the tables of results and everything else need. Imports nothing heavy."""

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console


def show_line(console: Console, line: str) -> None:
    """A line as it is: never wrapped, whatever the width, and free of markup."""
    console.out(line, highlight=False)


def show_json(console: Console, document: Mapping[str, Any]) -> None:
    """One JSON document on stdout, in ASCII: a terminal or pipe may know nothing else."""
    console.file.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
