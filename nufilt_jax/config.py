"""The settings of every method: one frozen dataclass each, each default in one place, citing its table."""

import dataclasses
import math
from typing import Literal, get_args

from nufilt_jax.errors import ConfigError, Problem, raise_all

Decomposition = Literal["auto", "eigh", "svd", "subspace"]
FirstTask = Literal["paper", "authors"]
OtherParams = Literal["pretrained", "first", "average"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What all method settings share: they are hashable, and refuse what makes no sense.

    Raises:
      ConfigError: listing every field that is out of range, named as on the command line.
    """

    def __post_init__(self) -> None:
        raise_all(ConfigError, self.problems())

    def problems(self) -> list[Problem]:
        """Every field out of range."""
        found = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if choices := get_args(field.type):
                if value not in choices:
                    found.append(problem(field.name, f"must be one of {', '.join(choices)}, got {value!r}"))
            elif field.type is int:
                if isinstance(value, bool) or not isinstance(value, int):
                    found.append(problem(field.name, f"must be a whole number, got {value!r}"))
                elif value < 0:
                    found.append(problem(field.name, f"must be at least 0, got {value}"))
            elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                found.append(problem(field.name, f"must be a finite number, got {value!r}"))
        return found


def option(field_name: str) -> str:
    """The command-line spelling of a field: `filter_rank` -> `--filter-rank`."""
    return "--" + field_name.replace("_", "-")


def problem(field_name: str, what: str, fix: str = "") -> Problem:
    """A problem with the setting `field_name`."""
    return Problem(option(field_name), what, fix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NullSpaceConfig(MethodConfig):
    """The null-space filter alone: row 2 of Table 4, arXiv:2509.21413v2.

    Attributes:
      filter_rank: r_p, directions of the earlier tasks that the new one may not touch (Table 9). 0 removes none.
      decomposition: route to the leading directions; all are exact or certified, see `core.subspace`.
      first_task: `paper` takes the first model as it is (Algorithm 1); `authors` also filters it, with the
        right singular vectors of a zero matrix, which deletes its first r_p input coordinates.
    """

    filter_rank: int = 128
    decomposition: Decomposition = "auto"
    first_task: FirstTask = "paper"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NufiltConfig(NullSpaceConfig):
    """NUFILT: filter, adapt, fuse. One set for every model and task count (Table 9, arXiv:2509.21413v2).

    Attributes:
      filter_rank: r_p, see `NullSpaceConfig`.
      adapter_rank: r_l, rank of the correction B A. 0 leaves the filter alone.
      task_rank: r_v, directions of the new task on which it should keep its answer. 0 drops that wish.
      steps: Adam steps on the data-free loss.
      learning_rate: Adam's; constant.
    """

    adapter_rank: int = 64
    task_rank: int = 8
    steps: int = 50
    learning_rate: float = 1e-3

    def problems(self) -> list[Problem]:
        """Every field out of range."""
        found = super().problems()
        if option("learning_rate") not in (p.where for p in found) and self.learning_rate <= 0:
            found.append(problem("learning_rate", f"must be above 0, got {self.learning_rate}"))
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class SumConfig(MethodConfig):
    """The plain sum of task vectors has no settings: row 1 of Table 4."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightAverageConfig(MethodConfig):
    """The running mean of the models has no settings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskArithmeticConfig(MethodConfig):
    """Task arithmetic.

    Attributes:
      scale: factor on each task vector; 0.3 for 8 tasks, 0.1 for 14 and 20 (Table 9).
    """

    scale: float = 0.3
