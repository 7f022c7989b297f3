"""What every merging rule shares: a pair of pure functions over one kind of state."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nufilt_jax.anatomy import FLAT, tensor_of
from nufilt_jax.config import MethodConfig
from nufilt_jax.core.forecast import Forecast
from nufilt_jax.errors import CheckpointError, Problem, raise_all
from nufilt_jax.linalg.factored import Factored, dense
from nufilt_jax.methods.data import TaskData
from nufilt_jax.methods.elementwise import blend
from nufilt_jax.methods.selection import Scope, is_float, published_layers
from nufilt_jax.methods.stacked import Params, Stacked, TaskVector, Tensor
from nufilt_jax.values import array_problem

C = TypeVar("C", bound=MethodConfig)
# What is only read: a rule's context serves every function that asks for less of it.
C_co = TypeVar("C_co", bound=MethodConfig, covariant=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledConfig(MethodConfig):
    """What the methods share that scale what they merge.

    Attributes:
      scale: λ.
    """

    scale: float


class LayerReport(NamedTuple):
    """What one step says about one layer, or about several with a leading layer axis.

    Attributes:
      losses: the loss before each Adam step and, where it needs no more examples, after the last; None where nothing
        is fitted.
      forecast: what can be told without data; None for rules that look at no directions.
    """

    losses: Tensor | None
    forecast: Forecast | None = None

    @property
    def has_losses(self) -> bool:
        """Whether there are any."""
        return self.losses is not None and self.losses.shape[-1] > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MergeState:
    """A merge after `step` tasks. A pytree: saving `delta`, `extra`, `added` and `step` is saving the merge.

    Attributes:
      base: θ0 by canonical name, as given and in its own dtypes.
      delta: D = θ^m − θ0 in float32, for the tensors that the rule touches. Kept instead of θ^m: at small updates,
        rounding θ^m would cost more than everything else together.
      step: number of tasks merged; static, since rules treat the first task otherwise.
      extra: what else a rule has to remember, by the names of D if it is per layer; empty for most.
      added: parameters that the rule adds to the model, by names that the base does not have; empty for most.
      report: what the last step said about its layers.
    """

    base: dict[str, Tensor]
    delta: Stacked
    step: int = dataclasses.field(default=0, metadata={"static": True})
    extra: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    added: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    report: dict[str, LayerReport] = dataclasses.field(default_factory=dict)

    @property
    def merged(self) -> dict[str, Tensor]:
        """θ^m: every tensor in the base's dtype, infinite where that cannot hold it, and what the rule added."""
        base, delta = self.base, self.delta
        moved = {name: merged_tensor(base[name], _whole(delta, name, base[name])) for name in self.touched}
        return base | moved | self.added

    def __repr__(self) -> str:
        n_numbers = sum(np.prod(shape) for shape in self.delta.shapes.values())
        told = f"{len(self.touched)} of {len(self.base)} tensors merged, {n_numbers / 1e6:.3g} M numbers"
        return f"MergeState(step={self.step}, {told})"

    @property
    def touched(self) -> tuple[str, ...]:
        """Names of the tensors that the layers of D are in, each once."""
        return tuple(dict.fromkeys(map(tensor_of, self.delta)))


def whole_delta(delta: Mapping[str, Any], name: str, base: Tensor) -> Any:
    """D of a whole tensor, put together from its layers; a factored one as it is kept."""
    if name in delta:
        return delta[name]
    if name + FLAT in delta:
        return delta[name + FLAT].reshape(base.shape)
    parts = [delta[f"{name}[{i}]"] for i in range(base.shape[0])]
    # On the host what is there already: whole tensors of experts are large.
    return np.stack(parts) if isinstance(parts[0], np.ndarray) else jnp.stack(parts)


def merged_tensor(base: Tensor, delta: Tensor, dtype: np.dtype | None = None) -> Tensor:
    """θ0 + D, added in float32, or in float64 if θ0 is that, and rounded once, to `dtype` or to the base's own."""
    # What is on the host is added there: a model need not fit on the device.
    xp = np if isinstance(base, np.ndarray) else jnp
    wide = np.float64 if base.dtype == np.float64 else np.float32
    return (xp.asarray(base, wide) + xp.asarray(delta, wide)).astype(dtype or base.dtype)


def _whole(delta: Mapping[str, Any], name: str, base: Tensor) -> Tensor:
    """D of a whole tensor, multiplied out if it is factored; vectors are not."""
    part = whole_delta(delta, name, base)
    return dense(part) if isinstance(part, Factored) else part


OnStack = Callable[[str, LayerReport], None]
Numbers = Mapping[str, Any]  # small arrays, by what they are


@dataclasses.dataclass(frozen=True)
class Context(Generic[C_co]):
    """What a rule is given besides state and task.

    Attributes:
      config: its settings, of the class that its file names.
      seed: of everything random.
      on_stack: progress callback.
      data: of the task, for rules that need it.
      numbers: of the whole model, as the looks so far have found them; empty if there were none.
      mesh: divides the layers of a stack among its devices, in rules that spread; None for one device.
      adapter_start: A0 by layer, in place of the drawn ones; None to draw them.
    """

    config: C_co
    seed: int
    on_stack: OnStack | None
    data: TaskData | None
    numbers: Numbers = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None
    adapter_start: Params | None = None


class Advance(NamedTuple):
    """What a rule returns for its tensors: the new D, and what goes into the state beside it."""

    delta: Stacked
    report: Mapping[str, LayerReport] = MappingProxyType({})
    extra: Mapping[str, Tensor] = MappingProxyType({})
    added: Mapping[str, Tensor] = MappingProxyType({})


StepFunction = Callable[[MergeState, TaskVector, Context[C]], Advance]


def as_it_is(state: MergeState, task: TaskVector, context: Context[MethodConfig]) -> Advance:
    """θ^m_1 = θ_1."""
    return Advance(blend(state.delta, task, keep=0.0, gain=1.0))


def scaled(state: MergeState, task: TaskVector, context: Context[ScaledConfig]) -> Advance:
    """θ^m_1 = θ0 + λ τ_1."""
    return Advance(blend(state.delta, task, keep=0.0, gain=context.config.scale))


def _never(config: MethodConfig) -> bool:
    return False


def _nothing(state: MergeState, task: TaskVector, config: MethodConfig) -> None:
    """What compiles in no time is not compiled beforehand."""


class Look(NamedTuple, Generic[C]):
    """One look at all parts of a model, before a task is merged into the first of them.

    Attributes:
      part: what one part tells; may take the memory of the state's D.
      joined: what all parts together tell, from the settings and what the looks before have found too. It is the same
        to the bit however the model is divided.
    """

    part: Callable[[MergeState, TaskVector, Context[C]], Numbers]
    joined: Callable[[Sequence[Numbers], C, Numbers], Numbers]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule(Generic[C]):
    """One merging rule, as its file states it.

    Attributes:
      name: as on the command line.
      config: class of its settings.
      first: how the first task is taken, from state and τ of the tensors it works on.
      advance: how every later task is merged, from the same; both may take the memory of the state's D.
      prepare: compiles what `advance` runs on one device of a state and τ of these shapes, if that takes long.
      scope: the tensors it works on.
      update: what it does to θ^m, in a line.
      touches: `scope` in words.
      cost: of one task, for a layer of m outputs and n inputs.
      source: where it was published.
      needs_data: whether it needs unlabelled examples of each task.
      adds_parameters: whether the merged model has more parameters than the base.
      whole_model: whether it works on all tensors at once. Where it does not, any part of the layers can be merged
        alone, and what in the state's `extra` is not by layer is alike in all parts.
      survey: the looks that find what numbers of the whole model it takes, as a threshold or a norm; given the whole
        model, it finds them by itself.
      first_survey: as much for the first task.
      states: arrays of the size of D that are kept from task to task, D included.
      in_factors: whether D and τ may be factored: it multiplies them from the right, and adds them up.
      trains_adapter: whether it trains a low-rank correction, whose start can be given.
      remembers: whether, with these settings, it keeps more from task to task than the merged model.
      workspace: memory that an update takes beside these, τ and what programs need for a few layers, in sizes of D.
      elementwise: whether merging costs no more than moving every number of D.
      on_matrices: whether its programs work on whole matrices, and need memory for a few of them. Not counted for what
        is `elementwise`.
      spreads: whether it solves layers one by one, so that several devices can share them.
      by_products: whether it solves layers by `core.solve`, a few at a time that are fewer where they are large.
    """

    name: str
    config: type[C]
    first: StepFunction[C] = as_it_is  # Eq. (1) of arXiv:2509.21413v2; not so for half of its baselines
    advance: StepFunction[C]
    prepare: Callable[[MergeState, TaskVector, C], None] = _nothing
    scope: Scope = published_layers
    update: str = "a rule of your own"
    touches: str = "what its scope says"
    cost: str = "not stated"
    source: str = "unpublished"
    needs_data: bool = False
    adds_parameters: bool = False
    whole_model: bool = False
    survey: tuple[Look[C], ...] = ()
    first_survey: tuple[Look[C], ...] = ()
    states: int = 1
    workspace: float = 0.0
    elementwise: bool = False
    on_matrices: bool = True
    spreads: bool = False
    by_products: bool = False
    in_factors: bool = False
    trains_adapter: bool = False
    remembers: Callable[[C], bool] = _never

    def __repr__(self) -> str:
        return f"Rule({self.name!r}: {self.update}; settings: {self.config.__name__})"

    @property
    def needs(self) -> str:
        """What it asks for beside the weights."""
        wanted = [(self.needs_data, "unlabelled examples"), (self.adds_parameters, "extra parameters")]
        return ", ".join(text for is_needed, text in wanted if is_needed) or "nothing"

    def looks(self, step: int) -> tuple[Look[C], ...]:
        """The survey before the task that comes after `step` others."""
        return self.survey if step else self.first_survey


def nonfinite_problem(where: str, name: str, *, is_touched: bool, way_out: str = "exclude it with --layers") -> Problem:
    """Says that a tensor has numbers that nothing can be merged from; what is not touched is merely kept."""
    what = "has NaN or infinite numbers"
    if is_touched:
        return Problem(where, what, f"fine-tune again, or {way_out}", name)
    return Problem(where, f"{what}; the merge does not touch it", tensor=name)


def nonfinite(params: Params, names: Iterable[str], where: str, *, are_touched: bool = True) -> list[Problem]:
    """A problem for each tensor of which that is true."""
    broken = (name for name in names if not np.isfinite(np.asarray(params[name])).all())
    return [nonfinite_problem(where, name, is_touched=are_touched) for name in broken]


def check_task(base: Params, task: Params, touched: Iterable[str]) -> None:
    """Refuses a task that lacks a tensor the rule touches, has it in another shape, or holds no floating numbers."""
    problems = []
    for name in touched:
        theirs = task.get(name)  # once: of a file it is read
        if theirs is None:
            problems.append(Problem("task", "is missing", "all models must be fine-tuned from this base", name))
        elif fault := array_problem(theirs, "task", name):
            problems.append(fault)
        elif theirs.shape != base[name].shape:
            what = f"has shape {list(theirs.shape)}, but {list(base[name].shape)} in the base"
            problems.append(Problem("task", what, "all models must be fine-tuned from this base", name))
        elif not is_float(theirs.dtype):
            what = f"holds {theirs.dtype}: quantised weights cannot be merged"
            problems.append(Problem("task", what, "dequantize the model first, or exclude it with --layers", name))
    raise_all(CheckpointError, problems)
