"""The stages of one step that follow V2 and V1, for stacks of layers of one width; `core.solve` puts them together."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nufilt_jax.core.adapt import Adapter, Objective, adapt, reduced_objective
from nufilt_jax.core.closed_form import smallest_correction
from nufilt_jax.core.filter import Target, null_space_filter, target
from nufilt_jax.core.forecast import share
from nufilt_jax.core.fuse import fuse
from nufilt_jax.core.settings import RightFactor, SolveConfig
from nufilt_jax.linalg.dense import inner, matmul, norm, product_norm, unit_scale
from nufilt_jax.linalg.directions import Directions, rank_mask
from nufilt_jax.linalg.factored import Matrix, plus_product, rows_of
from nufilt_jax.linalg.grams import Gram
from nufilt_jax.linalg.stacks import MatrixStacks, bounds, joined, rows

Shares = tuple[Float[Array, "*layers"], ...]  # removed, restored, drift, captured: see `Forecast`


def reduce(
    merged: MatrixStacks,
    task: MatrixStacks,
    grams: Gram,
    prior: Directions,
    new: Directions,
    *,
    right_factor: RightFactor = "P + BA",
) -> tuple[list["_Reduced"], Objective]:
    """Stage 1: the target of the adapter, and its objective reduced to the n inputs.

    Returns:
      The reduced stacks, and the objectives of all layers.
    """
    chex.assert_tree_shape_prefix((grams, prior, new), (bounds(merged)[-1][1],))
    reduce_layer = functools.partial(_reduce_layer, right_factor=right_factor)
    parts = [
        jax.vmap(reduce_layer)(d, t, *rows((grams, prior, new), i, j))
        for d, t, (i, j) in zip(merged, task, bounds(merged), strict=True)
    ]
    return parts, joined([part.objective for part in parts])


def train(
    objectives: Objective, start: Float[Array, "layers r_l n"], *, config: SolveConfig
) -> tuple[Adapter, Float[Array, "layers room"]]:
    """Stage 2: all Adam steps of all layers; the losses in the objectives' units."""
    chex.assert_tree_shape_prefix((objectives, start), (len(start),))
    # Every layer by itself: Adam is element by element and the paper's loss a sum over layers, so nothing is lost.
    how = {"steps": config.steps, "learning_rate": config.learning_rate, "room": config.room}
    return jax.vmap(functools.partial(adapt, **how))(objectives, start)


def fuse_updates(
    task: MatrixStacks, parts: list["_Reduced"], adapters: Adapter, *, right_factor: RightFactor = "P + BA"
) -> tuple[MatrixStacks, Shares]:
    """Stage 3: the updates τ (P + BA), and the shares of the forecast."""
    chex.assert_tree_shape_prefix(adapters, (bounds(task)[-1][1],))
    fuse_layer = functools.partial(_fuse_layer, right_factor=right_factor)
    fused = [
        jax.vmap(fuse_layer)(t, part, rows(adapters, i, j))
        for t, part, (i, j) in zip(task, parts, bounds(task), strict=True)
    ]
    return tuple(f[0] for f in fused), joined([f[1] for f in fused])


def correct(
    task: MatrixStacks, parts: list["_Reduced"], *, ridge: Float[Array, ""] | float
) -> tuple[MatrixStacks, Shares, Float[Array, "layers before_and_after"]]:
    """Stages 2 and 3 of the closed form: the updates τ P + E, shares, losses in the objectives' units."""
    correct_layer = jax.vmap(functools.partial(_correct_layer, ridge=ridge))
    corrected = [correct_layer(t, part) for t, part in zip(task, parts, strict=True)]
    shares, losses = joined([c[1:] for c in corrected])
    return tuple(c[0] for c in corrected), shares, losses


class _Reduced(NamedTuple):
    """One layer before its adapter."""

    target: Target
    objective: Objective
    prior_response: Float[Array, "*layers"]  # ‖D V2‖
    merged: Float[Array, "*layers"]  # ‖D‖


def _reduce_layer(
    merged: Float[Matrix, "m n"],
    task: Float[Matrix, "m n"],
    task_gram: Gram,
    prior: Directions,
    new: Directions,
    *,
    right_factor: RightFactor,
) -> _Reduced:
    # Here, not where directions are found: what counts depends on m, and stacks of one width differ in it.
    prior, new = rank_mask(prior, len(merged)), rank_mask(new, len(merged))
    goal = target(right_factor, merged, task, prior.vectors, new.vectors)
    # Small weights need no unit: beside Adam's ε, their gradients are nothing.
    unit = jnp.minimum(jnp.minimum(unit_scale(rows_of(merged)), unit_scale(rows_of(task)))[0, 0], 1)
    goal = goal._replace(wanted=unit * goal.wanted)
    objective = reduced_objective(task_gram, task, goal.wanted, prior.vectors, new.vectors, unit)
    # Orthonormal directions, whose sizes are ‖D v‖: their norm is ‖D V2‖, without another product.
    return _Reduced(goal, objective, norm(prior.sizes[None]), norm(rows_of(merged)))


def _fuse_layer(
    task: Float[Matrix, "m n"], part: _Reduced, adapter: Adapter, *, right_factor: RightFactor
) -> tuple[Float[Matrix, "m n"], Shares]:
    fused = fuse(right_factor, task, adapter, part.objective.prior)
    # Where no filter ran, V2 feels τ F too.
    felt = fused.felt if part.target.felt is None else part.target.felt + fused.felt
    return fused.update, _shares(task, part, fused.removed, fused.restored, felt)


def _correct_layer(
    task: Float[Matrix, "m n"], part: _Reduced, *, ridge: Float[Array, ""] | float
) -> tuple[Float[Matrix, "m n"], Shares, Float[Array, "2"]]:
    objective = part.objective
    filtered, removed = null_space_filter(task, objective.prior)
    scaled, right, losses = smallest_correction(part.target.wanted, objective.prior, objective.task, ridge=ridge)
    # E is linear in C, which was scaled. The losses stay so: `core.solve` judges them before large ones overflow.
    left = scaled / objective.unit
    felt = matmul(left, inner(right, objective.prior))
    shares = _shares(task, part, norm(removed), product_norm(left, right), felt)
    return plus_product(filtered, left, right), shares, losses


def _shares(
    task: Float[Matrix, "m n"],
    part: _Reduced,
    removed: Float[Array, ""],
    restored: Float[Array, ""],
    felt: Float[Array, "rows r_p"],
) -> Shares:
    size = norm(rows_of(task))
    return (
        share(removed, size),
        share(restored, size),
        share(norm(felt), part.prior_response),
        # D = 0 has nothing that its directions could miss.
        share(part.prior_response, part.merged, of_nothing=1),
    )
