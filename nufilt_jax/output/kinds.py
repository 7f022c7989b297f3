"""What the JSON documents of an output folder may hold: checked when they are read, whoever wrote them.

A kind is a type, a regular expression that a text fits as a whole, or a tuple of kinds of which one fits; `[kind]` is a
list of such, `{str: kind}` a map of such, and `{"name": kind}` an object that has these keys, and may have others.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nufilt_jax.strict_json import shown

_DIGEST = re.compile("[0-9a-f]{64}")  # any text would be told at length where files have changed
NUMBER = (int, float)
_MAYBE_NUMBER = (*NUMBER, type(None))
_FORECAST = {"near_equal_cuts": [str], "layers": {str: {str: (*_MAYBE_NUMBER, bool)}}}

STEP = {"task": str, "seconds": NUMBER, "losses": [_MAYBE_NUMBER]}
STEP_MAY_HAVE = {
    "resumed": bool,
    "outside": _MAYBE_NUMBER,
    "timings": {str: NUMBER},
    "examples": ({"file": str, "sha256": _DIGEST}, type(None)),
    "accuracy": ({str: NUMBER}, type(None)),
    "accuracy_limit": (int, type(None)),
}
MODEL = {"source": str, "revision": (str, type(None)), "sha256": {str: _DIGEST}}
RECIPE_KINDS = {
    "base": MODEL,
    "tasks": [{"name": str, **MODEL}],
    "steps": [{"task": str}],
    "method": str,
    "config": {},
    "seed": int,
    "layers": (str, type(None)),
    "other_params": str,
    "format": (str, type(None)),
    "dtype": (str, type(None)),
}
_COVERED = {"pattern": str, "kinds": int, "layers": int, "share": ({str: NUMBER}, type(None))}
RECIPE_MAY_HAVE = {
    "conv": bool,
    "recipe_version": int,
    "selected": [_COVERED],
    "left": [_COVERED],
    "windows": [{"layers": int}],
    "versions": {str: str},
    "device": str,
    "host": {},
    "files": {str: _DIGEST},
    "timings": {str: NUMBER},
    "compiled": {"programs": int, "from_cache": int, "seconds": NUMBER},
    "memory": {"allowed": int, "by": str, "planned": int, "peak": (int, type(None))},
    "adapter": {
        "modules": {str: str},
        "config": {},
        "rank": (int, type(None)),
        "energy_lost": _MAYBE_NUMBER,
        "layers": ({str: {"rank": int, "energy_lost": NUMBER}}, type(None)),
    },
}
WINDOW = {"layers": [str], "cells": [{**STEP, "forecast": _FORECAST}]}
FORECAST_DOCUMENT = {"steps": [{"task": str, **_FORECAST}]}
_SCORES = {"name": str, "accuracy": {str: NUMBER}, "acc": NUMBER, "bwt": _MAYBE_NUMBER}
_SCORES |= {"seconds": _MAYBE_NUMBER, "compile": _MAYBE_NUMBER}
EVALUATION_DOCUMENT = {"tasks": [str], "limit": (int, type(None)), "dtype": str, "models": [_SCORES]}


def require(value: Any, kind: Any, may_have: Mapping[str, Any] | None = None) -> None:
    """Checks a document.

    Args:
      value: as JSON was read.
      kind: what it must be.
      may_have: of an object, keys that it need not have, and what they must be.

    Raises:
      ValueError: it is something else; says where.

    >>> require({"steps": [{"task": 3}]}, {"steps": [{"task": str}]})
    Traceback (most recent call last):
    ValueError: steps[0].task is 3
    """
    for where, found in _misfits(value, kind, ""):
        raise ValueError(f"{where.removeprefix('.') or 'it'} is {shown(found)}")
    for key, allowed in (may_have or {}).items():
        if key in value:
            require({key: value[key]}, {key: allowed})


def _misfits(value: Any, kind: Any, where: str) -> Iterator[tuple[str, Any]]:
    """The first places that do not fit, with what stands there; a key that is missing holds nothing."""
    if isinstance(kind, tuple):
        if not any(next(_misfits(value, one, where), None) is None for one in kind):
            yield where, value
    elif isinstance(kind, list):
        if not isinstance(value, list):
            yield where, value
            return
        for index, item in enumerate(value):
            yield from _misfits(item, kind[0], f"{where}[{index}]")
    elif isinstance(kind, dict):
        if not isinstance(value, dict):
            yield where, value
        elif str in kind:
            for key, item in value.items():
                yield from _misfits(item, kind[str], f"{where}.{key}")
        else:
            for key, one in kind.items():
                yield from _misfits(value.get(key), one, f"{where}.{key}")
    elif isinstance(kind, re.Pattern):
        if not isinstance(value, str) or kind.fullmatch(value) is None:
            yield where, value
    # In Python a bool is an int: a number that is `true` would pass.
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        yield where, value
