"""Corrects leading eigenvectors of XᵀX to the accuracy of an SVD of X, and certifies them.

Forming XᵀX squares the spectrum, and float32 cannot tell its small end from rounding: where σ_k falls fast, the span
of the first eigenvectors is far off. X V, measured directly, shows how the vectors still couple.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nufilt_jax.linalg.dense import eigh_descending, gram, matmul, orthonormalize, unit_scale

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
# Random vectors that look for what the block misses altogether.
PROBES = 8
# Most that kept directions may couple with each other: as columns of a rank that the matrix does not have they would.
MOST_COUPLED = 0.9


def refine(
    x: Float[Array, "m n"], block: Float[Array, "n b"], rank: int
) -> tuple[Float[Array, "n b"], Float[Array, " k"], Float[Array, ""], Bool[Array, ""]]:
    """Separates the leading `rank` right singular vectors of X from the rest of a block that nearly contains them.

    Within the block, sweeps over the b x b matrix of responses: a small eigenproblem for the directions next to the
    cut, and simultaneous Jacobi rotations for all other pairs (in the manner of Ogita and Aishima, Japan J. Indust.
    Appl. Math. 35, 2018). Then one correction, to first order, from outside the block. Where X has a lower rank, its
    null directions count as the rest, also those among the leading ones.

    Certified is what came from orthonormal columns, has no more coupling left than the angle allows, within the block
    and with the outside, and beside which there is no more energy than the weakest direction kept allows. Directions
    kept may still couple with each other, but not as much as to hide that the rank is less.

    Args:
      x: the matrix.
      block: orthonormal columns, approximate singular vectors, the strongest first.
      rank: how many to keep; at most b, and less unless b = n.

    Returns:
      The block, nearly orthonormal, its first `rank` columns corrected and orthonormal; ‖X v‖ of these, measured
      before the correction, whose square is all it changes there; the relative gap at the cut; and whether the
      corrected columns are certified. Where they are not, once more may help.
    """
    eps = jnp.finfo(x.dtype).eps
    b = block.shape[1]
    unit = unit_scale(x)
    threshold = float(max(x.shape) * eps)  # of the rank, relative to σ_1
    skew = jnp.linalg.norm(gram(block) - jnp.eye(b, dtype=x.dtype))
    response = unit * matmul(x, block)
    coupling = gram(response)  # its entries are as exact as the directions they belong to are large
    scale = jnp.trace(coupling)
    coupling /= jnp.where(scale > 0, scale, 1)
    turn = jnp.eye(b, dtype=x.dtype)
    size = jnp.zeros((), x.dtype)
    for _ in range(SWEEPS):
        step, coupling, size = _sweep(coupling, rank, threshold)
        turn = matmul(turn, step)
    squares = jnp.diagonal(coupling) * scale
    block, kept_response = matmul(block, turn), matmul(response, turn[:, :rank])
    top, least = jnp.max(squares[:rank]), jnp.maximum(jnp.min(squares[rank:], initial=jnp.inf), 0)
    least = jnp.where(jnp.isfinite(least), least, 0)
    used = squares[:rank] > threshold**2 * top
    is_kept = jnp.pad(used, (0, b - rank))
    following = jnp.max(jnp.where(is_kept, 0, squares))
    outside = unit * matmul(x.T, kept_response)
    outside -= matmul(block, matmul(block.T, outside))
    # An outside direction of eigenvalue λ, 0 <= λ <= least, is missing by outside / (σ² − λ): take the middle for λ.
    middle, nearest = (jnp.maximum(squares[:rank] - part * least, eps * top) for part in (0.5, 1))
    middle, nearest = (jnp.where(distance > 0, distance, 1) for distance in (middle, nearest))
    missing = jnp.where(used[None], outside / middle[None], 0)
    left = jnp.where(used[None], outside / nearest[None], 0) * (least / 2 / middle)[None]
    root, last = jnp.sqrt(top), jnp.sqrt(jnp.min(jnp.where(used, squares[:rank], top)))
    following, outer = jnp.sqrt(following), jnp.sqrt(least)
    # What float32 rounding of X V leaves at these distances, in any route: within the block and outside it.
    least_distance = jnp.where(root > 0, eps * root, 1)
    within, beyond = (eps * root / jnp.maximum(last - other, least_distance) for other in (following, outer))
    angle = CERTIFIED_ANGLE * rank**0.5
    certified = (size <= jnp.minimum(angle + within, WORST_ANGLE)) & (last >= following) & (skew <= (b + 16) * eps)
    certified &= jnp.linalg.norm(left) <= jnp.minimum(angle + beyond, WORST_ANGLE)
    # Nothing above shows a strong direction at right angles to the block: its energy does. Where the rank is less, none
    # may be that would count, and those that do not count may hide one between them.
    full = jnp.all(used)
    energy = _energy_outside(unit * x, jnp.where(is_kept[None] | full, block, 0))
    certified &= energy <= jnp.where(full, (x.shape[1] - b + 1) * jnp.min(squares[:rank]), threshold**2 * top)
    certified &= _coupled(coupling[:rank, :rank], used) <= MOST_COUPLED
    cut = full & (last > 0) & (rank < min(x.shape))
    gap = jnp.where(cut, (last - following) / jnp.where(last > 0, last, 1), 1)
    kept = orthonormalize(block[:, :rank] + missing, 2)
    sizes = jnp.linalg.norm(kept_response, axis=0) / unit[0]
    return jnp.concatenate([kept, block[:, rank:]], axis=1), sizes, gap, certified


def _energy_outside(x: Float[Array, "m n"], block: Float[Array, "n b"]) -> Float[Array, ""]:
    """‖X (I − QQᵀ)‖² of a block Q, estimated."""
    probes = jax.random.normal(jax.random.key(0), (x.shape[1], PROBES), x.dtype)
    for _ in range(2):  # the second time for what rounding left
        probes -= matmul(block, matmul(block.T, probes))
    return jnp.sum(matmul(x, probes) ** 2) / PROBES


def _coupled(coupling: Float[Array, "k k"], used: Bool[Array, " k"]) -> Float[Array, ""]:
    """Largest sum of a used direction's couplings to the others, relative to both: below 1, all are independent."""
    size = jnp.sqrt(jnp.where(used, jnp.diagonal(coupling), 1))
    others = used[:, None] & used[None] & ~jnp.eye(len(used), dtype=bool)
    return jnp.max(jnp.sum(jnp.where(others, jnp.abs(coupling) / size[:, None] / size[None], 0), axis=1))


def _sweep(
    coupling: Float[Array, "b b"], rank: int, threshold: float
) -> tuple[Float[Array, "b b"], Float[Array, "b b"], Float[Array, ""]]:
    """One orthogonal (to first order) turn of the block towards decoupled kept and dropped sets.

    Kept are the leading directions that X uses; what it does not use is a null direction, which the rank mask drops.

    Returns:
      The turn, the coupling after it, and the size of its rotations between the two sets.
    """
    b = coupling.shape[0]
    width = min(CUT_WINDOW, rank, b - rank)
    window = slice(rank - width, rank + width)
    u = jnp.zeros((0, 0), coupling.dtype)
    if width > 0:  # something is cut off
        near = coupling[window, window]
        scale = jnp.max(jnp.abs(near))
        _, u = eigh_descending(near / jnp.where(scale > 0, scale, 1))
        coupling = coupling.at[:, window].set(matmul(coupling[:, window], u))
        coupling = coupling.at[window].set(matmul(u.T, coupling[window]))
    squares = jnp.diagonal(coupling)
    is_kept = (squares > threshold**2 * jnp.max(squares)) & (jnp.arange(b) < rank)
    distance = squares[None] - squares[:, None]
    root = jnp.sqrt(distance**2 + 4 * coupling**2)
    tangent = 2 * coupling / jnp.where(root > 0, distance + jnp.where(distance < 0, -root, root), 1)
    tangent = jnp.where(is_kept[None] & ~is_kept[:, None], tangent, 0)
    size = jnp.linalg.norm(tangent)
    tangent *= jnp.minimum(1, MOST_ROTATION / jnp.maximum(size, jnp.finfo(size.dtype).eps))
    rotation = jnp.eye(b, dtype=coupling.dtype) + tangent - tangent.T
    coupling = matmul(rotation.T, matmul(coupling, rotation))
    # The window's turn first, then the rotations.
    return rotation.at[window].set(matmul(u, rotation[window])), coupling, size
