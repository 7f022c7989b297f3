"""Leading right singular vectors of matrices with few rows: all work is with their rows, r of n numbers.

X Xᵀ and the triangle of a QR decomposition are r x r; n enters in products alone.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nufilt_jax.linalg.dense import eigh_descending, gram, inner, matmul, transpose, unit_scale
from nufilt_jax.linalg.directions import FULL_WIDTH, Directions, leading_by_svd, relative_gap
from nufilt_jax.linalg.dispatch import after
from nufilt_jax.linalg.stacks import joined

# Of what X has, the most that may be missing from a span that is certified, in units of √n eps ‖X‖.
_MOST_MISSING = 8.0


def leading_of_rows(stacks: Sequence[Float[Array, "_ r n"]], rank: int, *, until_certified: bool = True) -> Directions:
    """As `subspace.leading`, of matrices with fewer rows than columns.

    Args:
      stacks: of one width n.
      rank: how many vectors; at most r come out.
      until_certified: take the decomposition that needs no certificate.
    """
    parts: list[Directions] = []
    for stack in stacks:
        waiting = after(stack, parts[-1].vectors) if parts else stack
        parts.append(_leading(waiting, min(rank, *stack.shape[1:]), until_certified=until_certified))
    most = max(part.vectors.shape[2] for part in parts)
    return joined([_filled(part, most) for part in parts])


def _filled(found: Directions, columns: int) -> Directions:
    missing = columns - found.vectors.shape[2]
    vectors = jnp.pad(found.vectors, ((0, 0), (0, 0), (0, missing)))
    return found._replace(vectors=vectors, sizes=jnp.pad(found.sizes, ((0, 0), (0, missing))))


def _leading(x: Float[Array, "layers r n"], rank: int, *, until_certified: bool) -> Directions:
    n_layers, r, n = x.shape
    if rank == 0:
        none = jnp.zeros((n_layers, n, 0), x.dtype)
        return Directions(none, none[:, 0], jnp.ones(n_layers), jnp.ones(n_layers, bool))
    if r > n:
        return leading_by_svd((x,), rank)
    if rank == r and n > FULL_WIDTH and not until_certified:
        return _whole_span(x)
    scale = unit_scale(x)
    q, triangle = jnp.linalg.qr(transpose(x * scale))
    u, s, _ = jnp.linalg.svd(triangle, full_matrices=False)
    sizes = s / scale[..., 0]
    return Directions(matmul(q, u[..., :rank]), sizes[:, :rank], relative_gap(sizes, rank), jnp.ones(n_layers, bool))


def _whole_span(x: Float[Array, "layers r n"]) -> Directions:
    """Orthonormal vectors that span all rows, several times as fast as a QR decomposition.

    Eigenvectors of X Xᵀ make the rows nearly orthogonal, whatever the squaring did to the small ones; then Cholesky-QR
    of rows of length 1 does the rest, and one step of Newton-Schulz what that left. All of it with the vectors as rows.
    """
    unit = unit_scale(x)
    x = unit * x
    _, w = eigh_descending(gram(transpose(x)))
    turned = inner(w, x)
    overlap = gram(transpose(turned))
    lengths = jnp.sqrt(jnp.diagonal(overlap, axis1=1, axis2=2))
    is_zero, scale = lengths == 0, 1 / jnp.where(lengths == 0, 1, lengths)
    identity = jnp.eye(x.shape[1], dtype=x.dtype)[None]
    overlap = overlap * scale[:, :, None] * scale[:, None] + jnp.where(is_zero, 1, 0)[:, None] * identity
    lower = jnp.linalg.cholesky(overlap)
    # Near the identity where it is of use: its inverse costs nothing, and a product is faster than a solve.
    inverse = jax.scipy.linalg.solve_triangular(lower, jnp.broadcast_to(identity, lower.shape), lower=True)
    rows = matmul(jnp.where(jnp.isfinite(inverse), inverse * scale[:, None], 0), turned)
    rows = matmul(1.5 * identity - 0.5 * gram(transpose(rows)), rows)
    response = matmul(x, transpose(rows))
    return Directions(
        vectors=transpose(rows),
        sizes=jnp.linalg.norm(response, axis=1) / unit[..., 0],
        gap=jnp.ones(len(x)),
        certified=_spans(x, rows, response),
    )


def _spans(
    x: Float[Array, "layers r n"], rows: Float[Array, "layers r n"], response: Float[Array, "layers r r"]
) -> Bool[Array, " layers"]:
    """Whether X V Vᵀ is X, and the rows Vᵀ are orthonormal, or zero where X has rows of zeros."""
    eps = float(jnp.finfo(x.dtype).eps) * x.shape[2] ** 0.5
    missing = jnp.linalg.norm(x - matmul(response, rows), axis=(1, 2))
    overlap = gram(transpose(rows))
    skew = jnp.linalg.norm(overlap * (1 - jnp.eye(overlap.shape[1], dtype=x.dtype)[None]), axis=(1, 2))
    lengths = jnp.diagonal(overlap, axis1=1, axis2=2)
    is_unit = jnp.all((jnp.abs(lengths - 1) < _MOST_MISSING * eps) | (lengths == 0), axis=1)
    return (missing <= _MOST_MISSING * eps * jnp.linalg.norm(x, axis=(1, 2))) & (skew < _MOST_MISSING * eps) & is_unit
