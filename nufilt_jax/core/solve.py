"""One step of NUFILT on stacks of layers: filter, adapt and fuse as one XLA program.

A *group* is all layers with the same number of inputs n; a *stack* of it, all its layers of one shape [m, n].
Decompositions and the adapter see only n, so they run once for the group; products with m run stack by stack.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nufilt_jax.config import NufiltConfig, RightFactor, SolveConfig
from nufilt_jax.core import adapt as adapting
from nufilt_jax.core import subspace
from nufilt_jax.core.dispatch import run_alone
from nufilt_jax.core.filter import Kept, keep
from nufilt_jax.core.forecast import Forecast, share
from nufilt_jax.core.fuse import fuse
from nufilt_jax.core.grams import Gram, gram_of
from nufilt_jax.core.linalg import after, in_chunks, layers_at_once, matmul
from nufilt_jax.core.subspace import Directions, Stacks, rank_mask
from nufilt_jax.errors import ConfigError, Problem, raise_all

Shares = tuple[Float[Array, "*layers"], ...]  # removed, restored, drift, captured: see `Forecast`


class LayerSolution(NamedTuple):
    """What a solve returns; with a leading layer axis from `solve_stack`.

    Attributes:
      update: τ (P + BA), to be added to the merged weights. float32.
      losses: the data-free loss before each Adam step and after the last.
      ok: whether update and losses are finite.
    """

    update: Float[Array, "*layers m n"]
    losses: Float[Array, "*layers steps_and_one"]
    ok: Bool[Array, "*layers"]


class GroupSolution(NamedTuple):
    """Updates stack by stack; everything else over all layers of the group, in the same order."""

    updates: Stacks
    losses: Float[Array, "layers steps_and_one"]
    ok: Bool[Array, " layers"]
    forecast: Forecast


def solve_group(
    merged: Stacks, task: Stacks, start: Float[Array, "layers r_l n"], *, config: SolveConfig
) -> GroupSolution:
    """One step for all layers of one input width, as one program.

    On CPU stack by stack and a few layers at a time (`linalg.layers_at_once`), elsewhere all layers at once.

    Source: Eqs. (7)-(10) and (15)-(17), arXiv:2509.21413v2, in the reduced form of `core.adapt`.

    Args:
      merged: D = θ^m_{t−1} − θ0, a stack per layer shape, float32.
      task: τ = θ_t − θ0, likewise.
      start: A's start, one per layer in the order of the stacks.
      config: static.
    """
    whole = functools.partial(_solve_at_once, config=config)
    return jax.lax.platform_dependent(
        merged, task, start, cpu=functools.partial(_solve_in_turn, config=config), default=whole
    )


def _solve_in_turn(merged: Stacks, task: Stacks, start: Array, *, config: SolveConfig) -> GroupSolution:
    """`solve_group`, one stack after another, chunk by chunk."""

    def one(d: Array, t: Array, a: Array) -> GroupSolution:
        return _solve_at_once((d,), (t,), a, config=config)

    parts: list[GroupSolution] = []
    for d, t, (i, j) in zip(merged, task, subspace.bounds(merged), strict=True):
        d = after(d, parts[-1].losses) if parts else d  # no two LAPACK calls at once
        parts.append(in_chunks(one, (d, t, start[i:j]), layers_at_once()))
    rest = [part._replace(updates=()) for part in parts]
    joined = jax.tree.map(lambda *xs: jnp.concatenate(xs), *rest)
    return joined._replace(updates=tuple(part.updates[0] for part in parts))


def _solve_at_once(merged: Stacks, task: Stacks, start: Array, *, config: SolveConfig) -> GroupSolution:
    """`solve_group`, the layers of all stacks side by side: its stages, one after another."""
    prior = prior_directions(merged, config=config)
    task = tuple(after(x, prior.vectors) for x in task)  # no two LAPACK calls at once
    grams = gram_of(task)
    new = task_directions(task, grams, config=config)
    parts, problems = reduce(merged, task, grams, prior, new, right_factor=config.right_factor)
    adapters, losses = train(problems, start, config=config)
    updates, (removed, restored, drift, captured) = fuse_updates(task, parts, adapters)
    finite = [jnp.all(jnp.isfinite(update), axis=(1, 2)) for update in updates]
    return GroupSolution(
        updates=updates,
        losses=losses,
        ok=jnp.concatenate(finite) & jnp.all(jnp.isfinite(losses), axis=1),
        forecast=Forecast(removed, restored, drift, prior.gap, captured, prior.certified & new.certified),
    )


def prior_directions(merged: Stacks, *, config: SolveConfig) -> Directions:
    """Stage 1, V2: the leading directions of D, the Gram matrices included."""
    chosen = subspace.route(config.decomposition, merged[0].shape[-1])
    return subspace.leading(merged, gram_of(merged), config.filter_rank, chosen)


def task_directions(task: Stacks, grams: Gram, *, config: SolveConfig) -> Directions:
    """Stage 2, V1: the leading directions of τ, from τᵀτ, which the adapter needs anyway."""
    return subspace.leading(task, grams, config.task_rank, subspace.route(config.decomposition, task[0].shape[-1]))


def reduce(
    merged: Stacks,
    task: Stacks,
    grams: Gram,
    prior: Directions,
    new: Directions,
    *,
    right_factor: RightFactor = "P + BA",
) -> tuple[list["_Filtered"], adapting.Problem]:
    """Stage 3: filters τ and reduces the adapter's objective to the n inputs.

    Returns:
      The filtered stacks, and the problems of all layers.
    """
    filter_layer = functools.partial(_filter_layer, right_factor=right_factor)
    parts = [
        jax.vmap(filter_layer)(d, t, *jax.tree.map(lambda x, i=i, j=j: x[i:j], (grams, prior.vectors, new.vectors)))
        for d, t, (i, j) in zip(merged, task, subspace.bounds(merged), strict=True)
    ]
    return parts, jax.tree.map(lambda *xs: jnp.concatenate(xs), *(part.problem for part in parts))


def train(
    problems: adapting.Problem, start: Float[Array, "layers r_l n"], *, config: SolveConfig
) -> tuple[adapting.Adapter, Float[Array, "layers steps_and_one"]]:
    """Stage 4: all Adam steps of all layers."""
    return jax.vmap(functools.partial(adapting.adapt, steps=config.steps, learning_rate=config.learning_rate))(
        problems, start
    )


def fuse_updates(task: Stacks, parts: list["_Filtered"], adapters: adapting.Adapter) -> tuple[Stacks, Shares]:
    """Stage 5: the updates τ (P + BA), and the shares of the forecast."""
    fused = [
        jax.vmap(_fuse_layer)(t, part, jax.tree.map(lambda x, i=i, j=j: x[i:j], adapters))
        for t, part, (i, j) in zip(task, parts, subspace.bounds(task), strict=True)
    ]
    return tuple(f[0] for f in fused), jax.tree.map(lambda *xs: jnp.concatenate(xs), *(f[1] for f in fused))


class _Filtered(NamedTuple):
    """One layer after the filter, and the problem that its adapter has to solve."""

    kept: Kept
    problem: adapting.Problem
    prior_response: Float[Array, "*layers"]  # ‖D V2‖²
    merged: Float[Array, "*layers"]  # ‖D‖²


def _filter_layer(
    merged: Float[Array, "m n"],
    task: Float[Array, "m n"],
    task_gram: Gram,
    prior: Float[Array, "n r_p"],
    new: Float[Array, "n r_v"],
    *,
    right_factor: RightFactor,
) -> _Filtered:
    prior, prior_response = rank_mask(merged, prior)
    new, new_response = rank_mask(task, new)
    kept = keep(right_factor, task, prior, new, new_response, matmul(merged, new))
    problem = adapting.reduce(task_gram, task, kept.target, prior, new)
    return _Filtered(kept, problem, jnp.sum(prior_response**2), jnp.sum(merged**2))


def _fuse_layer(
    task: Float[Array, "m n"], filtered: _Filtered, adapter: adapting.Adapter
) -> tuple[Float[Array, "m n"], Shares]:
    update, restored = fuse(task, filtered.kept.update, adapter)
    size = jnp.sum(task**2)
    felt = matmul(restored, filtered.problem.prior)
    if filtered.kept.felt is not None:
        felt += filtered.kept.felt
    shares = (
        share(filtered.kept.removed, size),
        share(jnp.sum(restored**2), size),
        share(jnp.sum(felt**2), filtered.prior_response),
        share(filtered.prior_response, filtered.merged, of_nothing=1),
    )
    return update, shares


_solve_group = jax.jit(solve_group, static_argnames="config")


def solve_stack(
    merged_delta: Float[Array, "layers m n"],
    task_delta: Float[Array, "layers m n"],
    *,
    config: NufiltConfig,
    adapter_init: Float[Array, "layers r_l n"],
) -> LayerSolution:
    """One NUFILT step for a stack of same-shaped layers, as one compiled program.

    Source: Qiu et al., arXiv:2509.21413v2, Eqs. (7)-(10) and (15)-(17).

    Args:
      merged_delta: D = θ^m_{t−1} − θ0 of each layer. Any floating dtype; computed in float32.
      task_delta: τ = θ_t − θ0 of each layer.
      config: ranks, steps and learning rate; one compilation per config and shape.
      adapter_init: A's start, r_l = `config.adapter_rank` rows; [layers, 0, n] for rank 0.

    Returns:
      The update per layer, with θ^m_t = θ^m_{t−1} + update; its losses; and whether all of it is finite.

    Raises:
      ConfigError: shapes or dtypes that do not fit each other or `config`.

    >>> import jax, nufilt_jax as nj
    >>> d, t = jax.random.normal(jax.random.key(0), (2, 3, 16, 8))
    >>> config = nj.NufiltConfig(filter_rank=2, adapter_rank=4, task_rank=2)
    >>> many = nj.solve_stack(d, t, config=config, adapter_init=jax.numpy.full((3, 4, 8), 0.02))
    >>> many.update.shape, many.losses.shape, bool(many.ok.all())
    ((3, 16, 8), (3, 51), True)
    """
    _check(merged_delta, task_delta, adapter_init, config, ("layers", "m", "n"))
    merged, task, start = (jnp.asarray(x, jnp.float32) for x in (merged_delta, task_delta, adapter_init))
    found = run_alone(functools.partial(_solve_group, config=config), (merged,), (task,), start)
    return LayerSolution(found.updates[0], found.losses, found.ok)


def solve_layer(
    merged_delta: Float[Array, "m n"],
    task_delta: Float[Array, "m n"],
    *,
    config: NufiltConfig,
    adapter_init: Float[Array, "r_l n"],
) -> LayerSolution:
    """One NUFILT step for one layer: `solve_stack` of a stack of one.

    Source: Qiu et al., arXiv:2509.21413v2, Eqs. (7)-(10) and (15)-(17).

    Args:
      merged_delta: D = θ^m_{t−1} − θ0, [outputs, inputs].
      task_delta: τ = θ_t − θ0.
      config: ranks, steps and learning rate.
      adapter_init: A's start.

    Returns:
      The update, its losses and whether both are finite.

    Raises:
      ConfigError: shapes or dtypes that do not fit each other or `config`.

    >>> import jax, nufilt_jax as nj
    >>> d, t = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> config = nj.NufiltConfig(filter_rank=2, adapter_rank=0)
    >>> one = nj.solve_layer(d, t, config=config, adapter_init=jax.numpy.zeros((0, 8)))
    >>> one.update.shape
    (16, 8)
    """
    _check(merged_delta, task_delta, adapter_init, config, ("m", "n"))
    stacked = [jnp.asarray(x)[None] for x in (merged_delta, task_delta, adapter_init)]
    found = solve_stack(stacked[0], stacked[1], config=config, adapter_init=stacked[2])
    return LayerSolution(*(x[0] for x in found))


def _check(merged: Array, task: Array, start: Array, config: NufiltConfig, axes: tuple[str, ...]) -> None:
    arrays = {"merged_delta": merged, "task_delta": task, "adapter_init": start}
    problems = [
        Problem(name, f"must be a floating array, got {x.dtype}")
        for name, x in arrays.items()
        if not jnp.issubdtype(x.dtype, jnp.floating)
    ]
    if merged.ndim != len(axes) or 0 in merged.shape:
        problems.append(Problem("merged_delta", f"must be a non-empty [{', '.join(axes)}], got shape {merged.shape}"))
    elif task.shape != merged.shape:
        problems.append(Problem("task_delta", f"is {task.shape}, merged_delta is {merged.shape}"))
    elif start.shape != (wanted := (*merged.shape[:-2], config.adapter_rank, merged.shape[-1])):
        problems.append(Problem("adapter_init", f"must be {wanted} for this config, got {start.shape}"))
    raise_all(ConfigError, problems)
