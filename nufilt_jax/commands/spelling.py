"""How the values of options are spelt, and what they are called. Imports nothing heavy."""

from collections.abc import Mapping
from typing import Any

SPELLINGS: Mapping[Any, str] = {bool: "true or false", int: "a whole number", float: "a number"}


def spelt(value: object) -> str:
    """A setting's value as `--method-args` takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
