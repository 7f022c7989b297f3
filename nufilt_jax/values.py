"""What callers in Python give: numbers and arrays of any library, told from what is none."""

import math
import numbers
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from nufilt_jax.errors import Problem

T = TypeVar("T")


def whole_number(value: Any) -> int | None:
    """A whole number of any library's type; None for all else, as for True, which to Python is one too.

    >>> import numpy as np
    >>> whole_number(np.int64(3)), whole_number(3.0), whole_number(True)
    (3, None, None)
    """
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def finite_number(value: Any) -> int | float | None:
    """A finite number of any library's type; None for all else.

    >>> import numpy as np
    >>> finite_number(np.float32(0.5)), finite_number(2), finite_number(math.nan), finite_number("2")
    (0.5, 2, None, None)
    """
    number = whole_number(value)
    if number is not None or isinstance(value, bool) or not isinstance(value, numbers.Real):
        return number
    return float(value) if math.isfinite(value) else None


def native(value: T) -> T:
    """An array in the machine's own order of bytes, since JAX takes no other; all else as it is.

    >>> import numpy as np
    >>> native(np.ones(2, ">f4")).dtype == np.float32
    True
    """
    array: Any = value
    dtype: Any = getattr(array, "dtype", None)
    return value if getattr(dtype, "isnative", True) else array.astype(dtype.newbyteorder("="))


def array_problem(value: object, where: str, name: str) -> Problem | None:
    """Says that a value cannot be a tensor, since it is neither NumPy's nor JAX's; None if it can.

    Args:
      value: that a caller gave.
      where: what messages call the place.
      name: of the tensor.
    """
    import numpy as np  # with arrays, which settings and help have none of

    # torch has shapes and types too, but types of its own.
    if isinstance(getattr(value, "dtype", None), np.dtype) and isinstance(getattr(value, "shape", None), tuple):
        return None
    fix = ""
    if isinstance(value, Mapping):
        fix = "nufilt_jax.canonical makes nested parameters flat"
    elif hasattr(value, "numpy"):
        fix = "call .numpy(), or .float().numpy() of bfloat16"
    return Problem(where, f"must be an array of NumPy or JAX, got {_type_of(value)}", fix, name)


def _type_of(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def array_problems(params: Mapping[Any, object], where: str) -> list[Problem]:
    """What of a mapping cannot be tensors by name."""
    unnamed = [
        Problem(where, f"{name!r} is no name: it must be a text") for name in params if not isinstance(name, str)
    ]
    found = (array_problem(value, where, str(name)) for name, value in params.items())
    return [*unnamed, *filter(None, found)]


def model_problems(base: object, tasks: object) -> list[Problem]:
    """What of a base and of the tasks to be merged into it is no model."""
    models = {"base": base}
    if isinstance(tasks, Mapping):
        models |= {f"tasks[{name!r}]": model for name, model in tasks.items()}
    elif isinstance(tasks, Sequence) and not isinstance(tasks, str):
        models |= {f"tasks[{number}]": model for number, model in enumerate(tasks)}
    else:
        return [Problem("tasks", "must be a list of models, or models by name", "one alone in brackets too")]
    return [*filter(None, (_model_problem(value, where) for where, value in models.items()))]


def _model_problem(value: object, where: str) -> Problem | None:
    if isinstance(value, str | os.PathLike | Mapping):
        return None
    fix = ""
    if hasattr(value, "params"):
        fix = "nufilt_jax.from_flax takes params and config of a Flax model"
    elif hasattr(value, "state_dict"):
        fix = "give its state_dict() as arrays of NumPy"
    return Problem(where, f"must be a folder, a Hub id or weights by name, got {_type_of(value)}", fix)
