"""The settings that the core reads; the rules' own stand beside each rule."""

import dataclasses
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

    A pytree: to a compiled program its real numbers are data, and only all else says which program it is.

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
    def trained_rank(self) -> int:
        """Rank of the B A that is trained; 0 if there is none."""
        return self.adapter_rank if self.closed_form_ridge is None else 0


def _register(cls: type[SolveConfig]) -> None:
    """Makes a pytree of a class of settings."""

    def flatten(config: SolveConfig) -> tuple[list[Any], tuple[Any, ...]]:
        fields = [(field, getattr(config, field.name)) for field in dataclasses.fields(config)]
        return [x for field, x in fields if field.type is float], tuple(
            x for field, x in fields if field.type is not float
        )

    def unflatten(others: tuple[Any, ...], numbers: Iterable[Any]) -> SolveConfig:
        # Not by the class itself, which refuses what is no number of Python's: tracers are not.
        config, others_left, numbers_left = object.__new__(cls), iter(others), iter(numbers)
        for field in dataclasses.fields(cls):
            object.__setattr__(config, field.name, next(numbers_left if field.type is float else others_left))
        return config

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


_register(SolveConfig)
