"""A merging rule as it is used: a pair of pure functions, as an optimiser is in optax."""

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

from nufilt_jax.config import MethodConfig
from nufilt_jax.methods.data import TaskData
from nufilt_jax.methods.stacked import Params, TaskVector
from nufilt_jax.methods.state import MergeState, Numbers, OnStack


@runtime_checkable
class Update(Protocol):
    """Merges one more task."""

    def __call__(
        self,
        state: MergeState,
        task: Params | TaskVector,
        on_stack: OnStack | None = None,
        *,
        donate: bool = False,
        data: TaskData | None = None,
        numbers: Numbers = MappingProxyType({}),
        adapter_start: Params | None = None,
    ) -> MergeState:
        """The state after the task.

        Args:
          state: the merge so far.
          task: θ_t by canonical name, or τ as `task_vector` makes it with the names of `state.delta`; tensors that
            the rule does not touch may be missing.
          on_stack: called after each group of layers with its description and its layers' reports, stacked.
          donate: gives up `state.delta`, so that the new D can take its memory; else `state` is left as it is.
          data: unlabelled examples of the task, for the rules that need them.
          numbers: what the rule's survey has found of the whole model, where `state` is a part of one.
          adapter_start: A0 `[adapter_rank, n]` of every layer, by canonical name, in place of the drawn ones; see
            `nufilt_jax.draw_start`. The first task has no use for it.

        Raises:
          ConfigError: the rule needs data, and there are none; or starts that are missing or of another shape.
          CheckpointError: tensors that are missing or of another shape, all listed.
          SolveError: layers whose result is not finite, all listed.
        """
        ...


def _nothing(state: MergeState, task: TaskVector) -> None:
    """What compiles in no time is not compiled beforehand."""


class Merger(NamedTuple):
    """A merging rule, as an optimiser in optax: `state = init(base)`, `state = update(state, task)`.

    Attributes:
      init: the state before the first task, of a base.
      update: the state after one more task.
      look: one look of the rule's survey at a part of a model: of its state, whose D it may give up, τ, the look's
        number, and what the looks before it have found.
      name: of the rule.
      config: its settings.
      remembers: whether the state holds more than D: whether the merged model alone is not enough to go on.
      prepare: compiles, in any thread, what `update` runs after the first task, of a state and τ of these shapes.
    """

    init: Callable[[Params], MergeState]
    update: Update
    look: Callable[[MergeState, TaskVector, int, Numbers], Numbers]
    name: str = ""
    config: MethodConfig | None = None
    remembers: bool = False
    prepare: Callable[[MergeState, TaskVector], None] = _nothing

    def __repr__(self) -> str:
        return f"Merger({self.name}, {self.config})"
