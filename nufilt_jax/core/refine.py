"""Corrects leading eigenvectors of XᵀX to the accuracy of an SVD of X, and certifies them.

Forming XᵀX squares the spectrum, and float32 cannot tell its small end from rounding: where σ_k falls fast, the span
of the first eigenvectors is far off. X V, measured directly, shows how the vectors still couple.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nufilt_jax.core.linalg import eigh_descending, gram, matmul, orthonormalize

# Sweeps of rotations within the block.
SWEEPS = 3
# Directions on either side of the cut that each sweep sorts out exactly.
CUT_WINDOW = 32
# Rotations of one sweep together: more would leave the vectors far from orthonormal.
MOST_ROTATION = 0.5
# Root mean square angle, per direction, between certified and true directions, next to float32 rounding.
CERTIFIED_ANGLE = 1e-5
# Above this no gap is small enough to excuse it: the SVD decides.
WORST_ANGLE = 1e-2


def refine(
    x: Float[Array, "m n"], block: Float[Array, "n b"], rank: int
) -> tuple[Float[Array, "n b"], Float[Array, ""], Bool[Array, ""]]:
    """Separates the leading `rank` right singular vectors of X from the rest of a block that nearly contains them.

    Within the block, sweeps over the b x b matrix of responses: a small eigenproblem for the directions next to the
    cut, and simultaneous Jacobi rotations for all other pairs (in the manner of Ogita and Aishima, Japan J. Indust.
    Appl. Math. 35, 2018). Then one correction, to first order, from outside the block.

    Args:
      x: the matrix.
      block: orthonormal columns, approximate singular vectors, the strongest first.
      rank: how many to keep; less than b.

    Returns:
      The block, nearly orthonormal, its first `rank` columns corrected and orthonormal; the relative gap at the cut;
      and whether the corrected columns are certified. Where they are not, once more may help.
    """
    eps = jnp.finfo(x.dtype).eps
    b = block.shape[1]
    response = matmul(x, block)
    coupling = gram(response)  # its entries are as exact as the directions they belong to are large
    scale = jnp.trace(coupling)
    coupling /= jnp.where(scale > 0, scale, 1)
    turn = jnp.eye(b, dtype=x.dtype)
    size = jnp.zeros((), x.dtype)
    for _ in range(SWEEPS):
        step, size = _sweep(coupling, rank, float(max(x.shape) * eps))
        turn, coupling = matmul(turn, step), matmul(step.T, matmul(coupling, step))
    squares = jnp.diagonal(coupling) * scale
    block, kept_response = matmul(block, turn), matmul(response, turn[:, :rank])
    top, following, least = jnp.max(squares[:rank]), jnp.max(squares[rank:]), jnp.maximum(jnp.min(squares[rank:]), 0)
    used = squares[:rank] > (max(x.shape) * eps) ** 2 * top
    outside = matmul(x.T, kept_response)
    outside -= matmul(block, matmul(block.T, outside))
    # An outside direction of eigenvalue λ, 0 <= λ <= least, is missing by outside / (σ² − λ): take the middle for λ.
    middle = jnp.maximum(squares[:rank] - least / 2, eps * top)
    nearest = jnp.maximum(squares[:rank] - least, eps * top)
    missing = jnp.where(used[None], outside / jnp.where(middle > 0, middle, 1)[None], 0)
    left = jnp.where(used[None], outside / jnp.where(nearest > 0, nearest, 1)[None], 0) * (least / 2 / middle)[None]
    root, last = jnp.sqrt(top), jnp.sqrt(jnp.min(jnp.where(used, squares[:rank], top)))
    following, outer = jnp.sqrt(following), jnp.sqrt(least)
    # What float32 rounding of X V leaves at these distances, in any route: within the block and outside it.
    within, beyond = (eps * root / jnp.maximum(last - other, eps * root) for other in (following, outer))
    angle = CERTIFIED_ANGLE * rank**0.5
    certified = (size <= jnp.minimum(angle + within, WORST_ANGLE)) & (last >= following)
    certified &= jnp.linalg.norm(left) <= jnp.minimum(angle + beyond, WORST_ANGLE)
    gap = jnp.where(jnp.all(used) & (last > 0), (last - following) / jnp.where(last > 0, last, 1), 1)
    kept = orthonormalize(block[:, :rank] + missing, 2)
    return jnp.concatenate([kept, block[:, rank:]], axis=1), gap, certified


def _sweep(coupling: Float[Array, "b b"], rank: int, threshold: float) -> tuple[Float[Array, "b b"], Float[Array, ""]]:
    """One orthogonal (to first order) turn of the block towards decoupled kept and dropped sets.

    Returns:
      The turn, and the size of its rotations between the two sets.
    """
    b = coupling.shape[0]
    width = min(CUT_WINDOW, rank, b - rank)
    window = slice(rank - width, rank + width)
    near = coupling[window, window]
    scale = jnp.max(jnp.abs(near))
    _, u = eigh_descending(near / jnp.where(scale > 0, scale, 1))
    turn = jnp.eye(b, dtype=coupling.dtype).at[window, window].set(u)
    coupling = matmul(turn.T, matmul(coupling, turn))
    squares = jnp.diagonal(coupling)
    used = squares[:rank] > threshold**2 * jnp.max(squares)
    pull = coupling[rank:, :rank]
    distance = squares[None, :rank] - squares[rank:, None]
    root = jnp.sqrt(distance**2 + 4 * pull**2)
    tangent = 2 * pull / jnp.where(root > 0, distance + jnp.where(distance < 0, -root, root), 1)
    tangent = jnp.where(used[None], tangent, 0)  # what is not used is a null direction, which the rank mask drops
    size = jnp.linalg.norm(tangent)
    tangent *= jnp.minimum(1, MOST_ROTATION / jnp.maximum(size, jnp.finfo(size.dtype).eps))
    rotation = jnp.eye(b, dtype=coupling.dtype).at[rank:, :rank].set(tangent).at[:rank, rank:].set(-tangent.T)
    return matmul(turn, rotation), size
