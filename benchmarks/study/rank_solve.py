"""One step of NUFILT for many settings of its ranks, as one compiled program: what rank sensitivity asks for.

Other ranks are other shapes, and would be other programs. Here everything has the shapes of the largest ranks, and
what a setting does not have is zero: columns of V2 and V1, and rows of A, to which the training then stays blind.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nufilt_jax.core.settings import SolveConfig
from nufilt_jax.core.stages import fuse_updates, reduce, train
from nufilt_jax.linalg.directions import Directions
from nufilt_jax.linalg.dispatch import LAPACK_BATCH, after, in_chunks, layers_at_once, run_alone
from nufilt_jax.linalg.factored import rows_of
from nufilt_jax.linalg.grams import Gram, gram_of
from nufilt_jax.linalg.subspace import leading_of


def solve_settings(
    merged: Float[Array, "trajectories layers m n"],
    task: Float[Array, "layers m n"],
    start: Float[Array, "layers r_l n"],
    ranks: Int[Array, "settings 3"],
    *,
    config: SolveConfig,
) -> Float[Array, "settings layers m n"]:
    """The updates τ (P + BA) of a stack of layers, for every setting of the ranks; the adapters are trained by Adam.

    Source: Qiu et al., arXiv:2509.21413v2, Eqs. (7)-(10) and (15)-(17); the ranks of Fig. 4.

    Args:
      merged: D of every setting, or one D for all. float32, as `task` and `start`.
      task: τ.
      start: A's start at the largest rank; a setting takes the first rows.
      ranks: r_p, r_l and r_v of every setting, at most those of `config`.
      config: the largest ranks, and everything else. Only `svd` makes every cut exact: the other routes certify the
        span of the largest rank, within which they know the directions as well as float32 Gram matrices do.
    """
    return run_alone(functools.partial(_program, config=config), merged, task, start, ranks)


@functools.partial(jax.jit, static_argnames="config")
def _program(merged: Array, task: Array, start: Array, ranks: Array, *, config: SolveConfig) -> Array:
    def chunked(size: Callable[[], int]) -> Callable[..., Array]:
        return lambda *arrays: _solve(*arrays, config=config, size=size())

    return jax.lax.platform_dependent(
        merged, task, start, ranks, cpu=chunked(layers_at_once), default=chunked(lambda: LAPACK_BATCH)
    )


def _solve(merged: Array, task: Array, start: Array, ranks: Array, *, config: SolveConfig, size: int) -> Array:
    """`solve_settings`, at most `size` layers at a time; a row below is one layer of one setting."""
    (n_settings, _), (n_layers, m, n) = ranks.shape, task.shape

    def decompose(t: Array) -> tuple[Gram, Directions]:
        grams = gram_of((t,))
        return grams, leading_of((t,), config.task_rank, config.decomposition, grams)

    grams, new = in_chunks(decompose, (task,), size)
    own = jnp.arange(len(merged) * n_layers).reshape(len(merged), n_layers)
    merged = after(merged.reshape(-1, m, n), new.vectors)  # no two LAPACK calls at once
    prior = in_chunks(lambda d: leading_of((d,), config.filter_rank, config.decomposition), (merged,), size)

    def rows(i: Array, layer: Array, ranks: Array) -> Array:
        d, t, a = (merged[i],), (task[layer],), start[layer]
        gram, v2, v1 = (_at(x, where) for x, where in ((grams, layer), (prior, i), (new, layer)))
        v2, v1 = _cut(v2, ranks[:, 0]), _cut(v1, ranks[:, 2])
        parts, problems = reduce(d, t, gram, v2, v1, right_factor=config.right_factor)
        adapters, _ = train(problems, a * _first(a.shape[1], ranks[:, 1])[:, :, None], config=config)
        return rows_of(fuse_updates(t, parts, adapters, right_factor=config.right_factor)[0][0])

    which = jnp.broadcast_to(own, (n_settings, n_layers)).ravel(), jnp.tile(jnp.arange(n_layers), n_settings)
    updates = in_chunks(rows, (*which, jnp.repeat(ranks, n_layers, axis=0)), size)
    return updates.reshape(n_settings, n_layers, m, n)


def _at(tree: Any, where: Int[Array, " rows"]) -> Any:
    return jax.tree.map(lambda x: x[where], tree)


def _cut(directions: Directions, ranks: Int[Array, " rows"]) -> Directions:
    """The first directions of every row; the others are zero, which the rank mask leaves so."""
    kept = _first(directions.sizes.shape[1], ranks)
    return directions._replace(vectors=directions.vectors * kept[:, None], sizes=directions.sizes * kept)


def _first(most: int, ranks: Int[Array, " rows"]) -> Float[Array, "rows most"]:
    """1 for the first `ranks` of `most`, else 0."""
    return (jnp.arange(most)[None] < ranks[:, None]).astype(jnp.float32)
