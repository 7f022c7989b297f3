"""What a merge may be asked for, on a command line or from Python: what is refused or idle, with its sentence."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from nufilt_jax.checkpoints.dtypes import OUTPUT_DTYPES
from nufilt_jax.checkpoints.folders import FORMATS
from nufilt_jax.config import MethodConfig, OtherParams, OutputKind, problem
from nufilt_jax.engine.memory import parse_size
from nufilt_jax.errors import Problem, gathering
from nufilt_jax.methods import find
from nufilt_jax.output.recipe import Settings
from nufilt_jax.strict_json import shown
from nufilt_jax.values import whole_number

T = TypeVar("T")

_NO_FLAGS = re.compile("").flags  # a text would lose others
_DTYPES = {name: name for name in OUTPUT_DTYPES}
_OTHER_PARAMS: Mapping[str, OtherParams] = {name: name for name in get_args(OtherParams)}
_OUTPUTS: Mapping[str, OutputKind] = {name: name for name in get_args(OutputKind)}


def asked_settings(
    method: str,
    config: MethodConfig,
    problems: list[Problem],
    *,
    seed: Any = 0,
    layers: Any = None,
    conv: Any = False,
    other_params: Any = None,
    output: Any = None,
    **writing: Any,
) -> Settings:
    """Settings that a recipe can hold; what is refused goes to `problems`, and its default takes its place.

    Args:
      method: name of a rule that there is.
      config: its settings.
      problems: what is refused is added to these.
      seed: any whole number that a recipe holds.
      layers: a regular expression as text; None for the rule's own choice.
      conv: whether convolutions are matrices too.
      other_params: what becomes of the others; None for `pretrained`.
      output: what is written; None for `model`.
      **writing: those of `OF_WRITING`.
    """
    if isinstance(layers, re.Pattern) and layers.flags == _NO_FLAGS:
        layers = layers.pattern
    if layers is not None and not isinstance(layers, str):
        problems.append(problem("layers", f"must be a regular expression as text, got {layers!r}"))
        layers = None
    if conv not in (False, True):
        problems.append(problem("conv", f"must be true or false, got {conv!r}"))
        conv = False
    return Settings(
        method=method,
        config=config,
        seed=_seed(seed, problems),
        layers=layers,
        other_params=one_of("other_params", other_params, _OTHER_PARAMS, problems) or "pretrained",
        conv=bool(conv),
        output=one_of("output", output, _OUTPUTS, problems) or "model",
        **of_writing(problems, **writing),
    )


def of_writing(
    problems: list[Problem], *, format: Any = None, dtype: Any = None, adapter_out_rank: Any = None
) -> dict[str, Any]:
    """Those of `OF_WRITING`; what is refused goes to `problems`, and None takes its place."""
    rank = None if adapter_out_rank is None else _whole("adapter_out_rank", adapter_out_rank, problems)
    if rank is not None and rank < 1:
        problems.append(problem("adapter_out_rank", f"must be at least 1, got {rank}"))
        rank = None
    return {
        "format": one_of("format", format, FORMATS, problems),
        "dtype": one_of("dtype", dtype, _DTYPES, problems),
        "adapter_out_rank": rank,
    }


def asked_memory(size: Any, problems: list[Problem]) -> int | None:
    """Bytes that a merge may take, from a number of them or a text as `8GB`; None for half of what is free."""
    if size is None:
        return None
    if isinstance(size, str):
        with gathering(problems):
            return parse_size(size)
        return None
    # A product as `0.5 * total` is a float.
    is_finite = isinstance(size, float) and math.isfinite(size)
    return _whole("max_memory", int(size) if is_finite else size, problems)


def idle_settings(config: MethodConfig, given: Iterable[str]) -> list[Problem]:
    """The settings that were given and have no effect beside the others, to be warned about."""
    names = set(given)
    return [problem(key, f"has no effect: {why}") for key, why in config.idle.items() if key in names]


def idle_data(data: object, method: str) -> tuple[str, ...]:
    """A warning of examples that were given to a rule that learns from none."""
    return () if data is None or find(method).needs_data else (f"--data: no effect: {method} learns from no examples",)


def is_task_name(name: object) -> bool:
    """Whether a task can be called so: by any text in which something stands."""
    return isinstance(name, str) and bool(name.strip())


def task_name_problems(names: Any) -> list[Problem]:
    """Those of which that is not true."""
    bad = (name for name in names if not is_task_name(name))
    return [problem("task", f"{name!r} is no name: it must be a text that is not empty") for name in bad]


def one_of(name: str, value: Any, choices: Mapping[str, T], problems: list[Problem]) -> T | None:
    """What a value stands for; None for None, and for one that is refused, which goes to `problems`."""
    if value is None:
        return None
    if not isinstance(value, str) or value not in choices:
        problems.append(problem(name, f"must be one of {', '.join(choices)}, got {value!r}"))
        return None
    return choices[value]


def _seed(seed: Any, problems: list[Problem]) -> int:
    number = _whole("seed", seed, problems)
    if number is not None and number >= 1 << 63:
        problems.append(problem("seed", f"must be below 2^63, got {shown(number)}"))
        return 0
    if number is not None and number < 0:
        problems.append(problem("seed", f"must be at least 0, got {number}"))
        return 0
    return number or 0


def _whole(name: str, value: Any, problems: list[Problem]) -> int | None:
    number = whole_number(value)
    if number is None:
        problems.append(problem(name, f"must be a whole number, got {value!r}"))
    return number
