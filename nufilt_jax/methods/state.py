"""What every merging rule shares: a pair of pure functions over one kind of state."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from nufilt_jax.config import MethodConfig
from nufilt_jax.errors import CheckpointError, Problem, raise_all
from nufilt_jax.methods.stacked import Array, Params, Stacked, TaskVector


class LayerReport(NamedTuple):
    """What one step says about one layer; `core.solve.Forecast` explains the shares.

    Attributes:
      losses: the data-free loss before each Adam step and after the last; empty for rules without one.
    """

    losses: Array
    removed_share: Array
    restored_share: Array
    drift: Array
    cut_gap: Array
    certified: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MergeState:
    """A merge after `step` tasks. A pytree: saving `delta`, `extra` and `step` is saving the merge.

    Attributes:
      base: θ0 by canonical name, as given and in its own dtypes.
      delta: D = θ^m − θ0 in float32, for the tensors that the rule touches. Kept instead of θ^m: at small updates,
        rounding θ^m would cost more than everything else together.
      step: number of tasks merged.
      extra: what else a rule has to remember; empty for most.
      report: what the last step said about its layers.
    """

    base: dict[str, Array]
    delta: Stacked
    step: int = 0
    extra: dict[str, Array] = dataclasses.field(default_factory=dict)
    report: dict[str, LayerReport] = dataclasses.field(default_factory=dict)

    @property
    def merged(self) -> dict[str, Array]:
        """θ^m: every tensor of the base, in its own dtype."""
        return self.base | {name: merged_tensor(self.base[name], self.delta[name]) for name in self.delta}


def merged_tensor(base: Array, delta: Array, dtype: np.dtype | None = None) -> Array:
    """θ0 + D, added in float32 and rounded once, to `dtype` or to the base's own."""
    xp = np if isinstance(base, np.ndarray) else jnp
    return (xp.asarray(base, np.float32) + xp.asarray(delta)).astype(dtype or base.dtype)


OnStack = Callable[[str, LayerReport], None]


@runtime_checkable
class Update(Protocol):
    """Merges one more task."""

    def __call__(
        self, state: MergeState, task: Params | TaskVector, on_stack: OnStack | None = None, *, donate: bool = False
    ) -> MergeState:
        """The state after the task.

        Args:
          state: the merge so far.
          task: θ_t by canonical name, or τ as `task_vector` makes it with the names of `state.delta`; tensors that
            the rule does not touch may be missing.
          on_stack: called after each group of layers with its description and its layers' reports, stacked.
          donate: gives up `state.delta`, so that the new D can take its memory; else `state` is left as it is.

        Raises:
          CheckpointError: tensors that are missing or of another shape, all listed.
          SolveError: layers whose result is not finite, all listed.
        """
        ...


class Merger(NamedTuple):
    """A merging rule, as an optimiser in optax: `state = init(base)`, `state = update(state, task)`."""

    init: Callable[[Params], MergeState]
    update: Update


@dataclasses.dataclass(frozen=True)
class Context:
    """What a rule is given besides state and task.

    Attributes:
      config: its settings, of the class that its file names.
      seed: of everything random.
      on_stack: progress callback.
    """

    config: MethodConfig
    seed: int
    on_stack: OnStack | None


class Advance(NamedTuple):
    """What a rule returns for its tensors: the new D, and what goes into the state beside it."""

    delta: Stacked
    report: Mapping[str, LayerReport] = MappingProxyType({})
    extra: Mapping[str, Array] = MappingProxyType({})


class Rule(NamedTuple):
    """One merging rule, as its file states it.

    Attributes:
      name: as on the command line.
      config: class of its settings.
      advance: one step, from state and τ of the tensors it works on; may take the memory of the state's D.
      every_tensor: whether it works on every tensor instead of the selected layers.
    """

    name: str
    config: type[MethodConfig]
    advance: Callable[[MergeState, TaskVector, Context], Advance]
    every_tensor: bool = False


def check_task(base: Params, task: Params, touched: Iterable[str]) -> None:
    """Refuses a task that lacks a tensor the rule touches, or has it in another shape."""
    problems = []
    for name in touched:
        if name not in task:
            problems.append(Problem("task", "is missing", "all models must be fine-tuned from this base", name))
        elif task[name].shape != base[name].shape:
            what = f"has shape {list(task[name].shape)}, but {list(base[name].shape)} in the base"
            problems.append(Problem("task", what, "all models must be fine-tuned from this base", name))
    raise_all(CheckpointError, problems)
