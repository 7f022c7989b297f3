"""One step of NUFILT on stacks of layers: filter, adapt and fuse as one XLA program.

A *group* is all layers with the same number of inputs n; a *stack* of it, all its layers of one shape [m, n].
Decompositions and the adapter see only n, so they run once for the group; products with m run stack by stack.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nufilt_jax.core.forecast import Forecast
from nufilt_jax.core.settings import SolveConfig
from nufilt_jax.core.stages import correct, fuse_updates, reduce, train
from nufilt_jax.linalg.directions import first_of
from nufilt_jax.linalg.dispatch import in_chunks, layers_at_once, layers_by_products, run_alone
from nufilt_jax.linalg.factored import Factored, Matrix, after_all, all_finite, chosen, plus, rows_of
from nufilt_jax.linalg.grams import gram_of
from nufilt_jax.linalg.programs import by_platform
from nufilt_jax.linalg.stacks import MatrixStacks, bounds, joined
from nufilt_jax.linalg.subspace import leading_of


class GroupSolution(NamedTuple):
    """Updates stack by stack, or what they make of D; everything else over all layers of the group, in the same order.

    Attributes:
      updates: τ (P + BA), or D + τ (P + BA) if the updates are to be added.
      losses: as of `LayerSolution`; zeros follow where steps are data, as far as `SolveConfig.room` goes.
      ok: likewise.
      forecast: what can be told without data.
    """

    updates: MatrixStacks
    losses: Float[Array, "layers n_losses"]
    ok: Bool[Array, " layers"]
    forecast: Forecast


def solve_group(
    merged: MatrixStacks,
    task: MatrixStacks,
    start: Float[Array, "layers r_l n"],
    *,
    config: SolveConfig,
    ranks: Int[Array, "2"] | None = None,
    add: bool = False,
    until_certified: bool = True,
) -> GroupSolution:
    """One step for all layers of one input width, as one program.

    On CPU stack by stack and a few layers at a time (`dispatch.layers_by_products`), elsewhere all layers at once.

    Source: Eqs. (7)-(10) and (15)-(17), arXiv:2509.21413v2, in the reduced form of `core.adapt`.

    Args:
      merged: D = θ^m_{t−1} − θ0, a stack per layer shape, float32.
      task: τ = θ_t − θ0, likewise.
      start: A's start, one per layer in the order of the stacks.
      config: its real numbers and its steps may be traced; all else is static.
      ranks: r_p and r_v as data, at most those of `config`; None takes these. r_l is data if rows of `start` are zero:
        training leaves them, and what belongs to them, as they are.
      add: add the updates to D, in its memory where the program is given that; static.
      until_certified: what is done about layers whose directions get no certificate, see `subspace.leading`; static.
        Without it, D stays as it is in these layers if the updates are to be added: `mended` comes next.
    """
    _assert_one_group(merged, task, start, config)
    solve = functools.partial(_solve_at_once, config=config, ranks=ranks, add=add, until_certified=until_certified)
    return by_platform(merged, task, start, cpu=functools.partial(_solve_in_turn, solve), default=solve)


def _assert_one_group(merged: MatrixStacks, task: MatrixStacks, start: Array, config: SolveConfig) -> None:
    """What annotations cannot say of a group; checked while tracing, so free when it runs.

    `_check` and the merge refuse a user's arrays in words before: what is caught here is a mistake of this package.
    """
    width = merged[0].shape[-1]
    for d, t in zip(merged, task, strict=True):
        chex.assert_equal(d.shape, t.shape)
        chex.assert_shape(rows_of(d), (None, None, width))
    chex.assert_shape(start, (bounds(merged)[-1][1], config.trained_rank, width))


def _solve_in_turn(
    solve: Callable[[MatrixStacks, MatrixStacks, Array], GroupSolution],
    merged: MatrixStacks,
    task: MatrixStacks,
    start: Array,
) -> GroupSolution:
    """`solve_group`, one stack after another, chunk by chunk."""
    stacks: list[Matrix] = []
    parts: list[GroupSolution] = []
    for d, t, (i, j) in zip(merged, task, bounds(merged), strict=True):
        # No two LAPACK calls at once; at rank 0 the updates or the losses alone may wait for none.
        done = [jnp.ravel(x)[-1] for x in (rows_of(stacks[-1]), parts[-1].losses)] if parts else []

        def one(d: Matrix, t: Matrix, rows: Array, done: list[Array] = done) -> tuple[Matrix, GroupSolution]:
            found = solve((after_all(d, *done),), (after_all(t, *done),), start[rows])
            return found.updates[0], found._replace(updates=())

        # The updates take the place of D's stack: nothing of its size is allocated.
        size = layers_at_once() if isinstance(d, Factored) else layers_by_products(d[0].size)
        updates, rest = in_chunks(one, (d, t, jnp.arange(i, j)), size, in_place=True)
        stacks.append(updates)
        parts.append(rest)
    return joined(parts)._replace(updates=tuple(stacks))


def _solve_at_once(
    merged: MatrixStacks,
    task: MatrixStacks,
    start: Array,
    *,
    config: SolveConfig,
    ranks: Int[Array, "2"] | None,
    add: bool,
    until_certified: bool,
) -> GroupSolution:
    """`solve_group`, the layers of all stacks side by side: V2 and V1, and then the stages, one after another."""
    find = functools.partial(leading_of, decomposition=config.decomposition, until_certified=until_certified)
    prior = find(merged, config.filter_rank)
    if ranks is not None:
        prior = first_of(prior, tuple(map(rows_of, merged)), ranks[0])
    task = tuple(after_all(x, prior.vectors) for x in task)  # no two LAPACK calls at once
    grams = gram_of(tuple(map(rows_of, task)))  # which the adapter needs anyway
    new = find(task, config.task_rank, grams=grams)
    if ranks is not None:
        new = first_of(new, tuple(map(rows_of, task)), ranks[1])
    certified = prior.certified & new.certified
    parts, objectives = reduce(merged, task, grams, prior, new, right_factor=config.right_factor)
    if config.closed_form_ridge is None:
        adapters, losses = train(objectives, start, config=config)
        updates, shares = fuse_updates(task, parts, adapters, right_factor=config.right_factor)
    else:
        updates, shares, losses = correct(task, parts, ridge=config.closed_form_ridge)
    ok = jnp.all(jnp.isfinite(losses), axis=1)  # in their own units: as they are, those of large weights may overflow
    removed, restored, drift, captured = shares
    finite = [all_finite(update) for update in updates]
    if add:
        summed = []
        for d, t, update, (i, j) in zip(merged, task, updates, bounds(merged), strict=True):
            # What `mended` solves again has to start from D as it was, which may live in this memory alone.
            is_final = until_certified | certified[i:j]
            summed.append(chosen(is_final, jax.vmap(plus)(d, update, t), d))
        updates = tuple(summed)
    return GroupSolution(
        updates=updates,
        losses=losses / objectives.unit[:, None] ** 2,
        ok=jnp.concatenate(finite) & ok,
        forecast=Forecast(removed, restored, drift, prior.gap, captured, certified),
    )


def mended(
    found: GroupSolution,
    merged: Sequence[Any] | None,
    task: Sequence[Any],
    start: Any,
    again: Callable[..., GroupSolution],
) -> GroupSolution:
    """Solves the layers that got no certificate once more; `again` is compiled only if there are any.

    Each alone: beside others its result would depend on which they are, and so on how a model is cut into windows.

    Args:
      found: of `solve_group` with `until_certified` off; its memory is taken.
      merged: D as it was; its layers without a certificate are read. None where the updates of `found` still have it.
      task: τ.
      start: of every layer, as `again` takes it.
      again: `solve_group` with `until_certified` on, of the same settings; may take the memory of its first argument.
    """
    certified = np.array(found.forecast.certified)  # a copy: its memory is taken below
    for index, (i, j) in enumerate(bounds(tuple(task))):
        for row in np.flatnonzero(~certified[i:j]):
            before = found.updates[index] if merged is None else merged[index]
            d, t, own = _layer(before, row), _layer(task[index], row), _layer(start, i + row)
            new = run_alone(again, (d,), (t,), own)
            stack = _replaced(found.updates[index], new.updates[0], row)
            rest = _replaced(found._replace(updates=()), new._replace(updates=()), i + row)
            found = rest._replace(updates=(*found.updates[:index], stack, *found.updates[index + 1 :]))
    return found


@jax.jit
def _layer(stack: Any, row: Int[Array, ""] | int) -> Any:
    """One layer of arrays with a layer axis."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(jnp.asarray(x), row, 1), stack)


@functools.partial(jax.jit, donate_argnums=0)
def _replaced(old: Any, new: Any, row: Int[Array, ""] | int) -> Any:
    """Arrays with a layer axis, of which one layer is another; in their memory."""
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, row, 0), old, new)
