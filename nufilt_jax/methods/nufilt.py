"""NUFILT: filter, adapt, fuse (Qiu et al., arXiv:2509.21413v2), one program per input width."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt32

from nufilt_jax.anatomy import FLAT
from nufilt_jax.config import number
from nufilt_jax.core.adapt import normal_start
from nufilt_jax.core.filter import authors_first_filter
from nufilt_jax.core.settings import DirectionsConfig, SolveConfig
from nufilt_jax.core.solve import GroupSolution, mended, solve_group
from nufilt_jax.errors import Problem, SolveError, raise_all
from nufilt_jax.linalg.dispatch import run_alone
from nufilt_jax.linalg.factored import Factored
from nufilt_jax.linalg.programs import Program, is_traced
from nufilt_jax.linalg.spread import spread
from nufilt_jax.linalg.stacks import MatrixStacks, bounds, joined, rows
from nufilt_jax.methods.selection import published_layers
from nufilt_jax.methods.stacked import Group, Stacked, TaskVector, Tensor, groups_of
from nufilt_jax.methods.starts import adapter_keys, given_starts
from nufilt_jax.methods.state import Advance, Context, LayerReport, MergeState, OnStack, Rule, as_it_is

# The text's θ_1 (Algorithm 1), or what the program makes of it; which one Table 4 was measured with is open.
FirstTask = Literal["paper", "authors"]
Solver = Literal["adam", "closed_form"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstTaskConfig(DirectionsConfig):
    """What NUFILT shares with its filter alone.

    Attributes:
      first_task: `paper` takes the first model as it is (Algorithm 1); `authors` also filters it, with the
        right singular vectors of a zero matrix, which deletes its first r_p input coordinates.
    """

    first_task: FirstTask = "paper"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NufiltConfig(SolveConfig, FirstTaskConfig):
    """NUFILT: filter, adapt, fuse; the settings of `FirstTaskConfig`, of `SolveConfig`, and these.

    Attributes:
      solver: `adam` trains B A. `closed_form` writes down what answers the same loss best in place of τ B A, with no
        limit of rank (`core.closed_form`); adapter_rank, steps and learning_rate then have no effect.
      ridge: λ of the closed form, the price of a large correction, beside eigenvalues in [0, 1]; below 1e-4, rounding
        would decide. No effect on `adam`.
    """

    solver: Solver = "adam"
    ridge: float = number(1.0, at_least=1e-4, at_most=1e38)

    @property
    def idle(self) -> dict[str, str]:
        """The fields of the solver that was not chosen."""
        others = ("ridge",) if self.solver == "adam" else ("adapter_rank", "steps", "learning_rate")
        return dict.fromkeys(others, f"the solver is {self.solver}")

    @property
    def closed_form_ridge(self) -> float | None:
        """λ, if that is the solver."""
        return self.ridge if self.solver == "closed_form" else None


def first(state: MergeState, task: TaskVector, context: Context[FirstTaskConfig]) -> Advance:
    """θ^m_1 = θ_1 (Algorithm 1), or what the authors' program leaves of it."""
    taken, rank = as_it_is(state, task, context), context.config.filter_rank
    if context.config.first_task == "paper":
        return taken
    stacks = tuple(jax.vmap(lambda x: authors_first_filter(x, rank))(stack) for stack in taken.delta.stacks)
    return Advance(Stacked(stacks, taken.delta.names))


def advance(state: MergeState, task: TaskVector, context: Context[SolveConfig]) -> Advance:
    """θ^m_t = θ^m_{t−1} + τ (P + BA) (Algorithm 1), or τ times what else the settings name as its right factor.

    Raises:
      SolveError: layers whose solution is not finite, all listed.
    """
    config = context.config
    is_inline = is_traced((state.delta, task))
    merged: dict[Group, tuple[Any, ...]] = {}
    waiting: list[_UnderWay] = []
    report: dict[str, LayerReport] = {}
    groups = groups_of(state.delta)

    def finish(begun: _UnderWay) -> None:
        found = begun.found if is_inline else _mended(begun, config)
        merged[begun.group] = found.updates
        report.update(_told(begun.group, found, config, context.on_stack))

    for group in groups:
        keys = _starts(group, state.step + 1, context)
        d, t = (part.only(group.stacks).stacks for part in (state.delta, task))
        if _is_unmoved(t):
            merged[group] = d
            report.update(_unmoved(group, config))
            continue
        if context.mesh is None or is_inline or _is_thin(d):  # which are through before they could be sent anywhere
            step = functools.partial(_program(d, config), config=config, until_certified=is_inline)
            found = run_alone(step, d, t, keys)
        else:
            found = _spread_step(d, t, keys, config, context.mesh)
        waiting.append(_UnderWay(group, t, keys, found))
        # What is through is fetched and told of while the next groups run.
        while waiting and not is_inline and all(x.is_ready() for x in jax.tree.leaves(waiting[0].found)):
            finish(waiting.pop(0))
    for begun in waiting:  # where programs do not block, all are under way before the first is waited for
        finish(begun)
    broken = [
        Problem("task", "the solution is not finite", "lower --learning-rate", name)
        for name in task
        if name not in report
    ]
    raise_all(SolveError, broken)
    stacks = tuple(stack for group in groups for stack in merged[group])
    return Advance(Stacked(stacks, tuple(names for group in groups for names in group.stacks)), report)


def prepare(state: MergeState, task: TaskVector, config: SolveConfig) -> None:
    """Compiles what `advance` runs of such a state and task on one device, of which the shapes alone matter."""
    for group in groups_of(state.delta):
        d, t = (part.only(group.stacks).stacks for part in (state.delta, task))
        if not _is_unmoved(t):
            keys = np.zeros((len(group.names), 2), np.uint32)
            _program(d, config).prepare(d, t, keys, config=config, until_certified=False)


def _is_unmoved(task: tuple[Any, ...]) -> bool:
    """Whether a task did not adapt any of these layers."""
    return all(isinstance(x, Factored) and x.rank == 0 for x in task)


def _is_thin(delta: tuple[Any, ...]) -> bool:
    return all(isinstance(x, Factored) for x in delta)


def _program(delta: tuple[Any, ...], config: SolveConfig) -> Program[..., GroupSolution]:
    """What solves a group on one device."""
    return _thin_step if _is_thin(delta) and config.trained_rank > 0 else _step


def _unmoved(group: Group, config: SolveConfig) -> dict[str, LayerReport]:
    """The reports of layers that a task did not change: nothing is solved, and nothing is lost."""
    zeros = np.zeros(config.n_losses, np.float32) if _is_fitted(config) else None
    return {name: LayerReport(zeros) for name in group.names}


def _is_fitted(config: SolveConfig) -> bool:
    """Whether anything is: the losses of an objective that nothing was fitted to are not worth telling."""
    return config.trained_rank > 0 or config.closed_form_ridge is not None


class _UnderWay(NamedTuple):
    """A group whose program is running: its layers, τ, the keys of the adapters' starts, and what comes out."""

    group: Group
    task: tuple[Any, ...]
    keys: UInt32[np.ndarray, "layers 2"]
    found: GroupSolution


def _mended(begun: _UnderWay, config: SolveConfig) -> GroupSolution:
    """The group's new D, its layers without a certificate solved once more, from the D that they were left with."""
    again = functools.partial(_step, config=config, until_certified=True)
    return mended(begun.found, None, begun.task, begun.keys, again)


def _told(
    group: Group, solution: GroupSolution, config: SolveConfig, on_stack: OnStack | None
) -> dict[str, LayerReport]:
    """The reports of a group's layers, fetched in one go; layers whose solution is not finite have none."""
    told = solution.losses, solution.ok, solution.forecast
    losses, ok, forecast = told if is_traced(told) else jax.device_get(told)
    whole = LayerReport(losses[:, : config.n_losses] if _is_fitted(config) else None, forecast)
    if on_stack is not None:
        on_stack(f"{len(group.names)} layers of width {group.width}", whole)
    # With the dots all stay arrays: who saves a state as a pytree knows no numbers of NumPy's.
    return {
        name: jax.tree.map(lambda x, i=i: x[i, ...], whole)
        for i, name in enumerate(group.names)
        if is_traced(ok) or ok[i]
    }


def _added_step(
    deltas: MatrixStacks,
    task: MatrixStacks,
    keys: UInt32[Tensor, "layers 2"],
    *,
    config: SolveConfig,
    until_certified: bool,
) -> GroupSolution:
    """D + τ (P + BA) for the layers of one width; takes the memory of D."""
    width = deltas[0].shape[-1]
    drawn = keys.ndim == 2
    start = jax.vmap(lambda key: normal_start(key, config.trained_rank, width))(keys) if drawn else jnp.asarray(keys)
    return solve_group(deltas, task, start, config=config, add=True, until_certified=until_certified)


_step = Program(_added_step, static_argnames="until_certified", donate_argnums=0)
# Of layers in factors Adam is most of the work, and a third of that goes element by element.
_thin_step = Program(_added_step, by_elements=True, static_argnames="until_certified", donate_argnums=0)


def _spread_step(
    deltas: tuple[Tensor, ...],
    task: tuple[Any, ...],
    keys: UInt32[np.ndarray, "layers 2"],
    config: SolveConfig,
    mesh: Mesh,
) -> GroupSolution:
    """`_step`, the layers of each stack divided among the devices of a mesh."""
    others = tuple((t, keys[i:j]) for t, (i, j) in zip(task, bounds(task), strict=True))
    parts = spread(_stack_by_stack, mesh, deltas, others, config=config)
    return joined([rest for _, rest in parts])._replace(updates=tuple(update for update, _ in parts))


def _stack_by_stack(
    deltas: MatrixStacks, others: tuple[tuple[Tensor, Tensor], ...], *, config: SolveConfig
) -> tuple[tuple[Any, GroupSolution], ...]:
    """`_step` as `linalg.spread` takes it: a device has a part of every stack."""
    task, keys = zip(*others, strict=True)
    found = _step(deltas, task, jnp.concatenate(keys), config=config, until_certified=False)
    rest = found._replace(updates=())
    return tuple((d, rows(rest, i, j)) for d, (i, j) in zip(found.updates, bounds(deltas), strict=True))


def _starts(group: Group, step: int, context: Context[SolveConfig]) -> np.ndarray:
    """What the adapters of a group start from: the layers' keys, or the starts that are given."""
    if context.adapter_start is not None:
        return given_starts(context.adapter_start, group, context.config.trained_rank)
    return adapter_keys(context.seed, step, tuple(name.removesuffix(FLAT) for name in group.names))


RULE = Rule(
    name="nufilt",
    trains_adapter=True,
    config=NufiltConfig,
    first=first,
    advance=advance,
    prepare=prepare,
    scope=published_layers,
    update="θ + τ (P + BA): P removes the input directions that D uses most, BA is trained without data",
    touches="the blocks' linear layers",
    cost="2 leading subspaces, Adam steps of O(n²)",
    in_factors=True,
    source="Qiu et al., arXiv:2509.21413v2",
    spreads=True,
    by_products=True,
)
