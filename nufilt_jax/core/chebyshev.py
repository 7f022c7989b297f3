"""Leading eigenvectors of Gram matrices by Chebyshev-filtered subspace iteration (route `subspace`).

A block of a few more vectors than wanted is multiplied by a polynomial of the matrix that is large on the wanted part
of the spectrum and at most 1 on the rest (Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219, 2006). All of it is
products of tall blocks; the only decompositions are of the block's own small matrices. So it runs near the matrix
multiplication rate of any device, and a whole batch of matrices is one sequence of operations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nufilt_jax.core.grams import Gram
from nufilt_jax.core.linalg import after, eigh_descending, gram, matmul, orthonormalize, transpose

# Vectors in the block beyond those wanted: a wider block converges in fewer passes, each of which costs more.
LEAST_SURPLUS = 24
# Root mean square angle, per direction, between the block and the wanted directions when the iteration ends.
BLOCK_ANGLE = 1e-5
# Filters (of two products each) between two looks at the residual, and how many looks.
MOST_FILTERS = 16
MOST_ROUNDS = 4
# The root of the polynomial 2x² − 1.
ROOT = 0.5**0.5
# How much faster than the weakest wanted direction the strongest may grow in one product before float32 loses the
# former: beyond this, columns are made independent after every product instead of every other.
MOST_GROWTH = 600.0


def block_width(rank: int, width: int) -> int:
    """How many vectors the block needs for `rank` wanted ones."""
    return min(width, rank + max(LEAST_SURPLUS, rank // 2))


class _Block(NamedTuple):
    """Ritz vectors of a batch of matrices G, the strongest first."""

    vectors: Float[Array, "layers n b"]
    image: Float[Array, "layers n b"]  # G times the vectors
    values: Float[Array, "layers b"]
    angle: Float[Array, " layers"]  # what the wanted vectors still lack, Frobenius norm of the tangents
    goal: Float[Array, " layers"]
    rounds: Int[Array, ""]


def leading_block(grams: Gram, width: int, rank: int) -> Float[Array, "layers n b"]:
    """Orthonormal blocks that contain the leading `rank` eigenvectors, the strongest first.

    Args:
      grams: XᵀX of each layer.
      width: n, their size.
      rank: how many eigenvectors are wanted; b = `block_width(rank, n)` vectors come out.

    Returns:
      The blocks. Where the spectrum is too flat, or falls too steeply for float32, they are not converged:
      certifying them is the caller's.
    """
    trace = grams.trace()
    grams = grams.scaled(jnp.where(trace > 0, 1 / jnp.where(trace > 0, trace, 1), 0))
    tiny = float(jnp.finfo(trace.dtype).eps)
    start = jax.random.normal(jax.random.key(0), (width, block_width(rank, width)), trace.dtype)
    start = jnp.broadcast_to(start[None], (len(trace), *start.shape))
    # The multiple of the start keeps the block of full rank where the matrix is not.
    y = _condition(grams.times(start) + tiny * start)
    first = _ritz(grams, grams.times(y) + tiny * y, rank, jnp.zeros((), int))
    last = jax.lax.while_loop(
        lambda block: jnp.any(block.angle > block.goal) & (block.rounds < MOST_ROUNDS),
        lambda block: _round(grams, block, rank),
        first,
    )
    return last.vectors


def _ritz(grams: Gram, y: Float[Array, "layers n b"], rank: int, rounds: Int[Array, ""]) -> _Block:
    """Rayleigh-Ritz on the span of `y`, and how far it is from invariant."""
    eps = jnp.finfo(y.dtype).eps
    n, b = y.shape[-2:]
    q = orthonormalize(_condition(_condition(y)), 1)
    image = grams.times(q)
    values, u = eigh_descending(matmul(transpose(q), image))
    values = jnp.maximum(values, 0)
    q, image = matmul(q, u), matmul(image, u)
    wanted = values[:, :rank]
    residual = image[:, :, :rank] - q[:, :, :rank] * wanted[:, None]
    residual -= matmul(q, matmul(transpose(q), residual))
    top = values[:, :1]
    distance = jnp.maximum(wanted - values[:, -1:], eps * top)
    tangents = jnp.where(
        _used(values, rank), jnp.linalg.norm(residual, axis=1) / jnp.where(distance > 0, distance, 1), 0
    )
    # Rounding of the Gram matrix itself (of trace 1), which no iteration on it can undo.
    rounding = 1.5 * eps / n * np.sqrt(rank * max(n - b, 1)) / jnp.maximum(_last(values, rank) - values[:, -1], eps)
    goal = jnp.maximum(BLOCK_ANGLE * np.sqrt(rank), rounding)
    return _Block(q, image, values, jnp.linalg.norm(tangents, axis=1), goal, rounds)


def _round(grams: Gram, block: _Block, rank: int) -> _Block:
    """As many filters as the residual asks for, and another Rayleigh-Ritz."""
    values = block.values
    eps = jnp.finfo(values.dtype).eps
    edge = jnp.maximum(values[:, (rank + values.shape[1]) // 2], 4 * eps * values[:, 0])
    edge = jnp.where(edge > 0, edge, 1)
    x = jnp.maximum(2 * _last(values, rank) / edge - 1, 1 + 1e-3)
    growth = 2 * jnp.log(x + jnp.sqrt(x**2 - 1))  # of the weakest wanted vector, per filter
    margin = jnp.where(block.rounds == 0, 50, 5)  # the first Ritz values are far too small
    needed = jnp.log(margin * block.angle / block.goal) / growth
    needed = jnp.where(block.angle > block.goal, jnp.clip(jnp.ceil(needed), 1, MOST_FILTERS), 0)
    filters = jnp.max(needed).astype(int)
    steep = jnp.any(2 * values[:, 0] / edge > MOST_GROWTH * x)
    per_edge = (2 / edge)[:, None, None]
    scaled = grams.scaled(per_edge)
    y = _second_factor(scaled, block.image * per_edge - (1 + ROOT) * block.vectors, steep)
    y = jax.lax.fori_loop(1, filters, lambda _, y: _filter(scaled, _condition(y), steep), y)
    found = _ritz(grams, y, rank, block.rounds + 1)
    improves = jnp.any((found.angle > found.goal) & (found.angle < 0.5 * block.angle))
    return found._replace(rounds=jnp.where(improves, found.rounds, MOST_ROUNDS))


def _filter(scaled: Gram, y: Float[Array, "layers n b"], steep: Bool[Array, ""]) -> Float[Array, "layers n b"]:
    """The second Chebyshev polynomial, 2(x − √½)(x + √½) of x = scaled − 1, at most 1 on unwanted directions."""
    return _second_factor(scaled, scaled.times(y) - (1 + ROOT) * y, steep)


def _second_factor(scaled: Gram, y: Float[Array, "layers n b"], steep: Bool[Array, ""]) -> Float[Array, "layers n b"]:
    y = jax.lax.cond(steep, _condition, lambda y: y, y)
    return scaled.times(y) - (1 - ROOT) * y


def _condition(y: Float[Array, "layers n b"]) -> Float[Array, "layers n b"]:
    """The same span in better conditioned columns: one pass of Cholesky-QR.

    Where the columns nearly depend on each other, the factorisation needs a shift to succeed, and the pass improves
    them by a factor of some hundreds only.
    """
    b = y.shape[-1]
    eps = float(jnp.finfo(y.dtype).eps)
    eye = jnp.eye(b, dtype=y.dtype)[None]
    overlap = gram(y)
    size = jnp.diagonal(overlap, axis1=-2, axis2=-1)
    scale = jnp.where(size > 0, jax.lax.rsqrt(jnp.where(size > 0, size, 1)), 0)
    overlap = overlap * scale[:, :, None] * scale[:, None, :]
    sharp = jax.lax.linalg.cholesky(overlap + 16 * eps * eye, symmetrize_input=False)
    safe = jax.lax.linalg.cholesky(after(overlap, sharp) + 2 * b * eps * eye, symmetrize_input=False)
    failed = jnp.any(jnp.isnan(sharp), axis=(1, 2), keepdims=True)
    factor = jnp.where(failed, safe, sharp)
    inverse = jax.lax.linalg.triangular_solve(factor, scale[:, None, :] * eye, left_side=True, lower=True)
    return matmul(y, transpose(inverse))


def _used(values: Float[Array, "layers b"], rank: int) -> Bool[Array, "layers k"]:
    """Which wanted directions the matrix really has: the others are dropped later and need no accuracy."""
    return jnp.sqrt(values[:, :rank]) > values.shape[1] * jnp.finfo(values.dtype).eps * jnp.sqrt(values[:, :1])


def _last(values: Float[Array, "layers b"], rank: int) -> Float[Array, " layers"]:
    """The weakest wanted eigenvalue among those used."""
    return jnp.min(jnp.where(_used(values, rank), values[:, :rank], values[:, :1]), axis=1)
