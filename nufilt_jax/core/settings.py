"""The settings that the core reads; the rules' own stand beside each rule."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, Literal

import jax

from nufilt_jax.config import Decomposition, MethodConfig, number

RightFactor = Literal["P + BA", "I + BA", "BA"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectionsConfig(MethodConfig):
    """What the methods share that look at the leading directions of what is merged (Table 9, arXiv:2509.21413v2).

    Attributes:
      filter_rank: r_p, directions of the earlier tasks that the new one may not, or should not, touch. 0 is none.
      decomposition: route to the leading directions; all are exact or certified, see `linalg.subspace`.
    """

    filter_rank: int = 128  # a sixth of the 768 inputs of ViT-B; Fig. 4 varies it
    decomposition: Decomposition = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolveConfig(DirectionsConfig):
    """An adapter and its training: one set for every model and task count (Table 9, arXiv:2509.21413v2).

    A pytree: to a compiled program its real numbers and its steps are data, and only all else says which program it is.
    Ranks are shapes, as what a program takes grows with them; `solve_stack` takes them as data too, up to others.

    Attributes:
      adapter_rank: r_l, rank of the correction B A. 0 trains none.
      task_rank: r_v, directions of the new task on which it should keep its answer. 0 drops that wish.
      steps: Adam steps on the data-free loss.
      learning_rate: Adam's; constant.
    """

    adapter_rank: int = 64
    task_rank: int = 8
    steps: int = 50
    learning_rate: float = number(1e-3, above=0, at_most=1e38)

    def __init_subclass__(cls) -> None:
        _register(cls)

    @property
    def right_factor(self) -> RightFactor:
        """What τ is multiplied with to give the update."""
        return "P + BA"

    @property
    def closed_form_ridge(self) -> float | None:
        """λ of the closed form; None where B A is trained instead."""
        return None

    @property
    def n_losses(self) -> int:
        """How many losses a solve tells."""
        return self.steps + 1 if self.closed_form_ridge is None else 2

    @property
    def room(self) -> int:
        """For so many losses there is room in a program, which steps that are data do not exceed."""
        return self.__dict__.get("_room") or self.steps + 1

    @property
    def trained_rank(self) -> int:
        """Rank of the B A that is trained; 0 if there is none."""
        return self.adapter_rank if self.closed_form_ridge is None else 0


_ROOM = 64  # losses, or a multiple: more steps are another program


def _register(cls: type[SolveConfig]) -> None:
    """Makes a pytree of a class of settings."""

    @functools.cache
    def names() -> tuple[list[str], list[str]]:
        """Of the fields that are data, and of the others; not before the class is a dataclass."""
        fields = dataclasses.fields(cls)
        data = [field.name for field in fields if field.type is float or field.name == "steps"]
        return data, [field.name for field in fields if field.name not in data]

    def flatten(config: SolveConfig) -> tuple[list[Any], tuple[Any, ...]]:
        data, others = ([getattr(config, name) for name in part] for part in names())
        return data, (-(-config.room // _ROOM) * _ROOM, *others)

    def unflatten(static: tuple[Any, ...], numbers: Iterable[Any]) -> SolveConfig:
        # Not by the class itself, which refuses what is no number of Python's: tracers are not.
        config, (data, others) = object.__new__(cls), names()
        for name, value in zip(("_room", *others, *data), (*static, *numbers), strict=True):
            object.__setattr__(config, name, value)
        return config

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


_register(SolveConfig)
