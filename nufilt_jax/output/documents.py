"""The JSON documents of an output folder."""

import json
from pathlib import Path
from typing import Any

from nufilt_jax.durable import atomic_write
from nufilt_jax.errors import OutputError, Problem
from nufilt_jax.output.kinds import EVALUATION_DOCUMENT, FORECAST_DOCUMENT, require
from nufilt_jax.strict_json import JsonError, read_object, shown


def read_json(path: Path, fix: str = "restore it, or merge again into another folder") -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: of the file.
      fix: what to do about one that cannot be read, or is damaged.

    Raises:
      OutputError: it cannot be read, or is none.
    """
    try:
        with path.open("rb") as file:
            return read_object(file)
    except JsonError as error:
        raise OutputError(Problem(str(path), str(error), error.fix or fix)) from error
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise OutputError(Problem(str(path), what, fix)) from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object, whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    # As JSON itself spells what is no text: the bytes of a path may be any.
    atomic_write(path, text.encode(errors="backslashreplace"))


def read_forecast(path: Path) -> list[dict[str, Any]]:
    """The steps of a `forecast.json`.

    Raises:
      OutputError: it cannot be read, or is damaged.
    """
    return _read(path, FORECAST_DOCUMENT, "merge again")["steps"]


def read_scores(path: Path) -> dict[str, Any]:
    """The content of an `evaluation.json`: rows of scores on the same tasks.

    Raises:
      OutputError: it cannot be read, or is damaged.
    """
    fix = "remove it, and evaluate again"
    document = _read(path, EVALUATION_DOCUMENT, fix)
    for row in document["models"]:
        # No kind can say this: which keys a row needs stands elsewhere in the document.
        if lacking := [name for name in document["tasks"] if name not in row["accuracy"]]:
            what = f"is damaged: {shown(row['name'])} has no accuracy of {shown(lacking[0])}"
            raise OutputError(Problem(str(path), what, fix))
    return document


def _read(path: Path, kind: Any, fix: str) -> dict[str, Any]:
    document = read_json(path, fix)
    try:
        require(document, kind)
    except ValueError as error:
        raise OutputError(Problem(str(path), f"is damaged: {error}", fix)) from error
    return document
