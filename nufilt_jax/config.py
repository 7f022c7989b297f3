"""What all settings are made of: each rule has one frozen dataclass, each default in one place, citing its table."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from nufilt_jax.errors import ConfigError, Problem, raise_all
from nufilt_jax.values import finite_number, whole_number

Decomposition = Literal["auto", "eigh", "svd", "subspace"]
ComputeType = Literal["float32", "bfloat16"]  # of a forward pass
OtherParams = Literal["pretrained", "first", "average"]
OutputKind = Literal["model", "adapter"]
Variant = Literal["code", "text"]
ENTRY_POINTS = "nufilt_jax.methods"  # group of the rules that other packages bring


def number(
    default: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A numeric field with its range; whole numbers are at least 0 without saying so."""
    limits = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    return dataclasses.field(default=default, metadata={k: v for k, v in limits.items() if v is not None})


_KINDS = (bool, int, float, str)  # of settings, beside choices
_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "above": operator.gt,
    "at least": operator.ge,
    "below": operator.lt,
    "at most": operator.le,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What all method settings share: they are hashable, and refuse what makes no sense.

    Raises:
      ConfigError: listing every field that is out of range, named as on the command line.
    """

    def __post_init__(self) -> None:
        raise_all(ConfigError, self.problems())
        for field in dataclasses.fields(self):
            number = finite_number(getattr(self, field.name))
            if number is not None:  # a recipe holds Python's own numbers
                object.__setattr__(self, field.name, number)

    def problems(self) -> list[Problem]:
        """Every field out of range, or of a type that no setting has."""
        if undeclared := kind_problems(type(self)):
            return undeclared
        kinds = kinds_of(type(self))
        fields = dataclasses.fields(self)
        found = ((field.name, _fault(kinds[field.name], field, getattr(self, field.name))) for field in fields)
        return [problem(name, f"must be {fault}") for name, fault in found if fault]

    @property
    def idle(self) -> dict[str, str]:
        """The fields that have no effect beside the others, and why."""
        return {}


@functools.cache
def kinds_of(settings: type[MethodConfig]) -> dict[str, Any]:
    """The type of each field; a text, as `from __future__ import annotations` makes of every one, is looked up.

    Raises:
      ConfigError: what a text names is not in the module.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(settings)}
    if any(isinstance(kind, str) for kind in kinds.values()):
        try:
            hints = get_type_hints(settings)
        except (NameError, AttributeError, TypeError) as error:
            what = f"{settings.__name__} has settings whose types cannot be found: {error}"
            raise ConfigError(problem("method", what, "import or define them at the top of its module")) from error
        kinds = {name: hints[name] for name in kinds}
    return kinds


def kind_problems(settings: type[MethodConfig]) -> list[Problem]:
    """The fields of a type that no setting has."""
    fix = "declare it as bool, int, float, str or a Literal of texts"
    return [
        problem("method", f"{settings.__name__}.{name} is declared as {_told(kind)}, which no setting can be", fix)
        for name, kind in kinds_of(settings).items()
        if kind not in _KINDS and not _is_choice(kind)
    ]


def _is_choice(kind: Any) -> bool:
    return get_origin(kind) is Literal and all(isinstance(choice, str) for choice in get_args(kind))


def _told(kind: Any) -> str:
    return kind.__name__ if type(kind) is type else str(kind).replace("typing.", "")


def _fault(kind: Any, field: dataclasses.Field, value: object) -> str:
    """What a field's value must be and is not, with the value; empty if all is well."""
    if choices := get_args(kind):
        return "" if value in choices else f"one of {', '.join(choices)}, got {value!r}"
    if kind is bool:
        return "" if isinstance(value, bool) else f"true or false, got {value!r}"
    if kind is str:
        return "" if isinstance(value, str) else f"a text, got {value!r}"
    if kind is int and whole_number(value) is None:
        return f"a whole number, got {value!r}"
    number = finite_number(value)
    if number is None:
        return f"a finite number, got {value!r}"
    limits = {"at least": 0} if kind is int else {}
    broken = [f"{word} {limit}" for word, limit in (limits | field.metadata).items() if not _HOLDS[word](number, limit)]
    return f"{broken[0]}, got {value}" if broken else ""


def differing(there: object, here: object, where: str) -> str:
    """Says of a setting that it has another value somewhere.

    >>> differing(None, 3, "in this merge")
    'is not given in this merge, got 3'
    """
    told = "not given" if there is None else repr(there)
    return f"is {told} {where}, " + ("and is not given here" if here is None else f"got {here!r}")


def option(field_name: str) -> str:
    """The command-line spelling of a field: `filter_rank` -> `--filter-rank`."""
    return "--" + field_name.replace("_", "-")


def problem(field_name: str, what: str, fix: str = "") -> Problem:
    """A problem with the setting `field_name`."""
    return Problem(option(field_name), what, fix)
