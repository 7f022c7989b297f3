"""Leading eigenvectors of Gram matrices by Chebyshev-filtered subspace iteration (route `subspace`).

A block of a few more vectors than wanted is multiplied by a polynomial of the matrix that is large on the wanted part
of the spectrum and at most 1 on the rest (Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219, 2006). All of it is
products of tall blocks; the only factorisations are Cholesky's, of the block's own small matrices. So it runs near the
matrix multiplication rate of any device, and a whole batch of matrices is one sequence of operations.

Between products the columns are made independent again (Cholesky-QR). That is the QR iteration: it leaves them in
the order of their eigenvalues, and nearly decoupled, which is all that `linalg.refine` needs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nufilt_jax.linalg.dense import gram, inner, matmul, orthonormalize, scattered, transpose
from nufilt_jax.linalg.dispatch import after
from nufilt_jax.linalg.grams import Gram

# Vectors in the block beyond those wanted: a wider block converges in fewer products, each of which costs more.
LEAST_SURPLUS = 24
# Root mean square angle, per direction, between the block and the wanted directions when the iteration ends.
BLOCK_ANGLE = 1e-5
# Highest degree of a polynomial, and how many more polynomials a block may get.
MOST_DEGREE = 32
MOST_ROUNDS = 3
# By how much the polynomial shall exceed what estimates from a random block, and later ones, ask for. The D of many
# merged tasks is flat at the cut: with 10, half of the 3072 x 768 layers got no certificate after 9 to 13 tasks like
# those of benchmarks/common/models.py, and had to be solved again; four times as much is one or two products more.
FIRST_MARGIN, LATER_MARGIN = 40, 5
# How much faster than the weakest wanted direction the strongest may grow between two passes of Cholesky-QR: beyond,
# float32 loses the former. As long as the block is new, columns still hold more of the strongest than rounding puts
# there: what may be left of its growth after as many products as there were before.
MOST_GROWTH = 2e6
MOST_FIRST_GROWTH = 30.0
_POWERS = 2  # products of a random block before its polynomial


def block_width(rank: int, width: int) -> int:
    """How many vectors the block needs for `rank` wanted ones."""
    return min(width, rank + max(LEAST_SURPLUS, rank // 2))


class _Block(NamedTuple):
    """Orthonormal columns that come to contain the leading eigenvectors of a batch of matrices G, of trace 1.

    Attributes:
      vectors: the columns, about in the order of their eigenvalues, the largest first.
      values: estimates of the eigenvalues, in falling order.
      edge: where the unwanted part of the spectrum begins.
      angle: what the wanted vectors still lack, Frobenius norm of the tangents.
      goal: angle at which to end.
    """

    vectors: Float[Array, "layers n b"]
    values: Float[Array, "layers b"]
    edge: Float[Array, " layers"]
    angle: Float[Array, " layers"]
    goal: Float[Array, " layers"]


class _Polynomial(NamedTuple):
    """What a block is multiplied with: the Chebyshev polynomial of 2 G / edge - 1.

    Attributes:
      edge: of each layer's spectrum, as in `_Block`.
      degree: of all layers.
      stride: products between two passes of Cholesky-QR.
    """

    edge: Float[Array, " layers"]
    degree: Int[Array, ""]
    stride: Int[Array, ""]


Times = Callable[[Float[Array, "layers n b"]], Float[Array, "layers n b"]]  # G Y


def leading_block(grams: Gram, width: int, rank: int) -> tuple[Float[Array, "layers n b"], Float[Array, " layers"]]:
    """Orthonormal blocks that contain the leading `rank` eigenvectors, about the strongest first.

    Two products, and one polynomial of the degree that a random block is then expected to need. Where the spectrum is
    too flat, or falls too steeply for float32, that is not enough: certifying the blocks is the caller's.

    Args:
      grams: XᵀX of each layer.
      width: n, their size.
      rank: how many eigenvectors are wanted; b = `block_width(rank, n)` vectors come out.

    Returns:
      The blocks, and where the unwanted part of each spectrum begins, for `improved_block`.
    """
    n_layers, b = len(grams.unit), block_width(rank, width)
    # One start for all layers: a result must not depend on the batch, nor on a seed that somebody would have to choose.
    start = jnp.broadcast_to(scattered(width, b, grams.unit.dtype)[None], (n_layers, width, b))
    unknown = _Polynomial(jnp.ones(n_layers, start.dtype), jnp.asarray(MOST_DEGREE), jnp.asarray(1))
    return _multiplied(_of_trace_one(grams), start, unknown, rank, first=-_POWERS)


def improved_block(
    grams: Gram, vectors: Float[Array, "layers n b"], edge: Float[Array, " layers"], rank: int
) -> Float[Array, "layers n b"]:
    """As many more polynomials as the residual asks for; none where it is as small as float32 can make it.

    Args:
      grams: XᵀX of each layer.
      vectors: orthonormal blocks.
      edge: what `leading_block` told.
      rank: how many eigenvectors are wanted.
    """
    times = _of_trace_one(grams)

    def wanted(state: tuple[_Block, Int[Array, ""]]) -> Bool[Array, ""]:
        block, rounds = state
        return jnp.any(block.angle > block.goal) & (rounds < MOST_ROUNDS)

    def one_round(state: tuple[_Block, Int[Array, ""]]) -> tuple[_Block, Int[Array, ""]]:
        block, rounds = state
        filtered, _ = _multiplied(times, block.vectors, _planned(block, rank, LATER_MARGIN), rank, first=0)
        found = _look(times, filtered, block.edge, rank)
        # Less than halved means that rounding is reached: more rounds would only take time.
        improves = jnp.any((found.angle > found.goal) & (found.angle < 0.5 * block.angle))
        return found, jnp.where(improves, rounds + 1, MOST_ROUNDS)

    block, _ = jax.lax.while_loop(wanted, one_round, (_look(times, vectors, edge, rank), jnp.zeros((), int)))
    return block.vectors


def _of_trace_one(grams: Gram) -> Times:
    trace = grams.trace()
    factor = jnp.where(trace > 0, 1 / jnp.where(trace > 0, trace, 1), 0)
    return lambda y: factor * grams.times(y)


def _multiplied(
    times: Times, vectors: Float[Array, "layers n b"], polynomial: _Polynomial, rank: int, *, first: int
) -> tuple[Float[Array, "layers n b"], Float[Array, " layers"]]:
    """A block, orthonormal, after a polynomial; all products and passes of Cholesky-QR are one loop of the program.

    Args:
      times: multiplies with the matrices.
      vectors: the block.
      polynomial: which; not used if it is found on the way.
      rank: how many eigenvectors are wanted.
      first: number of the first factor: 0, or below it for a random block, which gets powers of G before, that tell of
        the spectrum what the polynomial depends on.

    Returns:
      The block, and the edge of the polynomial.
    """
    # The multiple of the block keeps it of full rank where the matrix is not.
    tiny = float(jnp.finfo(vectors.dtype).eps)
    roots = jnp.asarray(_roots_by_degree(), vectors.dtype)

    def is_left(state: tuple[Int[Array, ""], Array, _Polynomial]) -> Bool[Array, ""]:
        return state[0] <= state[2].degree  # one more than there are factors: the last pass comes twice

    def step(state: tuple[Int[Array, ""], Array, _Polynomial]) -> tuple[Int[Array, ""], Array, _Polynomial]:
        i, y, p = state
        is_power = i < 0

        def factor(y: Float[Array, "layers n b"]) -> Float[Array, "layers n b"]:
            per_edge = jnp.where(is_power, 1, 2 / p.edge)[:, None, None]
            return per_edge * times(y) + jnp.where(is_power, tiny, -1 - roots[p.degree, jnp.maximum(i, 0)]) * y

        y = jax.lax.cond(i < p.degree, factor, lambda y: y, y)
        # Counted from the end: what follows the last factor must bring the whole block back to orthonormal columns.
        is_due = is_power | (i >= p.degree - 1) | ((p.degree - 2 - i) % p.stride == 0)
        y, diagonal = jax.lax.cond(is_due, _independent, lambda y: (y, jnp.ones_like(y[:, 0])), y)
        is_last_power = i == -1
        p = jax.lax.cond(is_last_power, lambda: _planned(_seen(y, diagonal, rank), rank, FIRST_MARGIN), lambda: p)
        return i + 1, y, p

    _, y, polynomial = jax.lax.while_loop(is_left, step, (jnp.asarray(first), vectors, polynomial))
    return orthonormalize(y, 1), polynomial.edge


def _seen(vectors: Float[Array, "layers n b"], diagonal: Float[Array, "layers b"], rank: int) -> _Block:
    """What two products with a random start tell of the spectrum: R's diagonal is near the eigenvalues."""
    n, b = vectors.shape[-2:]
    values = -jnp.sort(-diagonal)
    edge = _edge(values, rank)
    # What each wanted direction lacks in a random block after two products, in the mean.
    tangents = jnp.where(_used(values, rank), (edge[:, None] / values[:, :rank]) ** _POWERS, 0)
    angle = jnp.linalg.norm(tangents, axis=1) * np.sqrt((n - b) / (b - rank + 1))
    return _Block(vectors, values, edge, angle, jnp.full_like(angle, BLOCK_ANGLE * rank**0.5))


def _planned(block: _Block, rank: int, margin: float) -> _Polynomial:
    """The polynomial, of as high a degree as the block's angle asks for.

    Args:
      block: what is known of it.
      rank: how many eigenvectors are wanted.
      margin: `FIRST_MARGIN` for a block after its first products, or `LATER_MARGIN`.
    """
    edge = jnp.where(block.edge > 0, block.edge, 1)
    # Of a flat spectrum the argument is 1, where the polynomial does not grow at all: keep the logarithm positive.
    x = jnp.maximum(2 * _last(block.values, rank) / edge - 1, 1 + 1e-3)
    growth = x + jnp.sqrt(x**2 - 1)  # of the weakest wanted vector, per degree
    needed = jnp.clip(jnp.ceil(jnp.log(2 * margin * block.angle / block.goal) / jnp.log(growth)), 1, MOST_DEGREE)
    degree = jnp.max(jnp.where(block.angle > block.goal, needed, 1)).astype(int)
    # At 2 λ_1 / edge - 1 the polynomial grows by twice that per degree.
    steepest = jnp.log(jnp.maximum(jnp.max(4 * block.values[:, 0] / edge / growth), 2))
    stride = np.log(MOST_GROWTH) / steepest
    if margin == FIRST_MARGIN:
        stride = jnp.minimum(stride, _POWERS + np.log(MOST_FIRST_GROWTH) / steepest)
    return _Polynomial(edge, degree, jnp.maximum(stride.astype(int), 1))


def _look(times: Times, vectors: Float[Array, "layers n b"], edge: Float[Array, " layers"], rank: int) -> _Block:
    """How far the span of orthonormal vectors is from invariant."""
    eps = jnp.finfo(vectors.dtype).eps
    n, b = vectors.shape[-2:]
    image = times(vectors)
    quotients = jnp.maximum(jnp.sum(vectors * image, axis=1), 0)
    values, wanted = -jnp.sort(-quotients), quotients[:, :rank]
    residual = image[:, :, :rank] - matmul(vectors, inner(vectors, image[:, :, :rank]))
    distance = jnp.maximum(wanted - values[:, -1:], eps * values[:, :1])
    distance = jnp.where(distance > 0, distance, 1)
    tangents = jnp.where(_used(values, rank), jnp.linalg.norm(residual, axis=1) / distance, 0)
    # Rounding of the Gram matrix itself, which no iteration on it can undo.
    rounding = 0.75 * eps / n * np.sqrt(rank * max(n - b, 1)) / jnp.maximum(_last(values, rank) - values[:, -1], eps)
    # A block's values are too low: another look only raises the edge.
    return _Block(
        vectors=vectors,
        values=values,
        edge=jnp.maximum(edge, _edge(values, rank)),
        angle=jnp.linalg.norm(tangents, axis=1),
        goal=jnp.maximum(BLOCK_ANGLE * np.sqrt(rank), rounding),
    )


def _edge(values: Float[Array, "layers b"], rank: int) -> Float[Array, " layers"]:
    """An estimate from within the surplus, too low, of the eigenvalue next to the block."""
    eps = jnp.finfo(values.dtype).eps
    # Two thirds into the surplus: a block's last values are the farthest from converged.
    return jnp.maximum(values[:, (rank + 2 * values.shape[1]) // 3], 4 * eps * values[:, 0])


def _chebyshev_roots(degree: int) -> np.ndarray:
    """Roots of the Chebyshev polynomial, in an order that keeps the products of its first factors small (Leja)."""
    roots = list(np.cos(np.pi * (np.arange(degree) + 0.5) / degree))
    ordered = [roots.pop(0)]
    while roots:
        ordered.append(roots.pop(int(np.argmax([np.abs(np.subtract(root, ordered)).prod() for root in roots]))))
    return np.array(ordered)


@functools.cache
def _roots_by_degree() -> np.ndarray:
    """A row per degree, from 0 on, filled up with zeros."""
    rows = [_chebyshev_roots(degree) for degree in range(1, MOST_DEGREE + 1)]
    return np.stack([np.zeros(MOST_DEGREE), *(np.pad(row, (0, MOST_DEGREE - len(row))) for row in rows)])


def _independent(y: Float[Array, "layers n b"]) -> tuple[Float[Array, "layers n b"], Float[Array, "layers b"]]:
    """The same span in columns less dependent on each other: one pass of Cholesky-QR.

    Where the columns nearly depend on each other, the factorisation needs a shift to succeed, and the pass improves
    them by a factor of some hundreds only.

    Returns:
      The columns Q, and the diagonal of R with y = Q R.
    """
    b = y.shape[-1]
    eps = float(jnp.finfo(y.dtype).eps)
    eye = jnp.eye(b, dtype=y.dtype)[None]
    overlap = gram(y)
    size = jnp.diagonal(overlap, axis1=-2, axis2=-1)
    scale = jnp.where(size > 0, jax.lax.rsqrt(jnp.where(size > 0, size, 1)), 0)
    overlap = overlap * scale[:, :, None] * scale[:, None, :]
    sharp = jax.lax.linalg.cholesky(overlap + 16 * eps * eye, symmetrize_input=False)
    failed = jnp.isnan(sharp[:, -1:, -1:])  # from where it fails to the end, a factor is NaN

    def shifted() -> Float[Array, "layers b b"]:
        safe = jax.lax.linalg.cholesky(after(overlap, sharp) + 2 * b * eps * eye, symmetrize_input=False)
        return jnp.where(failed, safe, sharp)

    factor = jax.lax.cond(jnp.any(failed), shifted, lambda: sharp)
    inverse = jax.lax.linalg.triangular_solve(factor, scale[:, None, :] * eye, left_side=True, lower=True)
    return matmul(y, transpose(inverse)), jnp.sqrt(size) * jnp.diagonal(factor, axis1=-2, axis2=-1)


def _used(values: Float[Array, "layers b"], rank: int) -> Bool[Array, "layers k"]:
    """Which wanted directions stand out of the rounding of the matrix: no iteration on it finds the others."""
    return values[:, :rank] > 4 * jnp.finfo(values.dtype).eps * values[:, :1]


def _last(values: Float[Array, "layers b"], rank: int) -> Float[Array, " layers"]:
    """The weakest wanted eigenvalue among those used."""
    return jnp.min(jnp.where(_used(values, rank), values[:, :rank], values[:, :1]), axis=1)
