"""The JSON documents of an output folder."""

import json
from pathlib import Path
from typing import Any

from nufilt_jax.durable import atomic_write
from nufilt_jax.errors import OutputError, Problem
from nufilt_jax.output.kinds import FORECAST_DOCUMENT, require
from nufilt_jax.strict_json import JsonError, read_object


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      OutputError: it cannot be read, or is none.
    """
    try:
        with path.open("rb") as file:
            return read_object(file)
    except JsonError as error:
        raise OutputError(Problem(str(path), str(error), error.fix or "remove the folder to start over")) from error
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise OutputError(Problem(str(path), what, "remove the folder to start over")) from error


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
    document = read_json(path)
    try:
        require(document, FORECAST_DOCUMENT)
    except ValueError as error:
        raise OutputError(Problem(str(path), f"is damaged: {error}", "merge again")) from error
    return document["steps"]
