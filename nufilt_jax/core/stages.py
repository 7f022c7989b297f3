"""The stages of one step, for stacks of layers of one width; `core.solve` puts them together."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nufilt_jax.config import RightFactor, SolveConfig
from nufilt_jax.core import adapt as adapting
from nufilt_jax.core import subspace
from nufilt_jax.core.closed_form import smallest_correction
from nufilt_jax.core.filter import Kept, keep
from nufilt_jax.core.forecast import share
from nufilt_jax.core.fuse import fuse
from nufilt_jax.core.grams import Gram, gram_of
from nufilt_jax.core.linalg import matmul
from nufilt_jax.core.subspace import Directions, Stacks, rank_mask

Shares = tuple[Float[Array, "*layers"], ...]  # removed, restored, drift, captured: see `Forecast`


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


def correct(
    task: Stacks, parts: list["_Filtered"], *, ridge: float
) -> tuple[Stacks, Shares, Float[Array, "layers before_and_after"]]:
    """Stages 4 and 5 of the closed form: the updates τ P + E, the shares of the forecast, and the losses."""
    correct_layer = jax.vmap(functools.partial(_correct_layer, ridge=ridge))
    corrected = [correct_layer(t, part) for t, part in zip(task, parts, strict=True)]
    shares, losses = jax.tree.map(lambda *xs: jnp.concatenate(xs), *(c[1:] for c in corrected))
    return tuple(c[0] for c in corrected), shares, losses


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
    update, restored, felt = fuse(task, filtered.kept.update, adapter, filtered.problem.prior)
    return update, _shares(task, filtered, restored, felt)


def _correct_layer(
    task: Float[Array, "m n"], filtered: _Filtered, *, ridge: float
) -> tuple[Float[Array, "m n"], Shares, Float[Array, "2"]]:
    problem = filtered.problem
    restored, losses = smallest_correction(filtered.kept.target, problem.prior, problem.task, ridge=ridge)
    felt = matmul(restored, problem.prior)
    return filtered.kept.update + restored, _shares(task, filtered, restored, felt), losses


def _shares(
    task: Float[Array, "m n"], filtered: _Filtered, restored: Float[Array, "m n"], felt: Float[Array, "m r_p"]
) -> Shares:
    """Of what is restored, the directions of the earlier tasks have `felt`."""
    size = jnp.sum(task**2)
    if filtered.kept.felt is not None:
        felt += filtered.kept.felt
    return (
        share(filtered.kept.removed, size),
        share(jnp.sum(restored**2), size),
        share(jnp.sum(felt**2), filtered.prior_response),
        share(filtered.prior_response, filtered.merged, of_nothing=1),
    )
