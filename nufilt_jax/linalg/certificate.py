"""Which refined directions are the leading ones: five inequalities, each for what the others cannot see.

Q is a block of b columns, v_1 to v_k those to keep, X v their responses. All is measured on X itself: an eigenvalue
of XᵀX in float32 is rounding noise where σ is below √eps σ_1. Kept directions may still couple with each other, as only
their span is used.

Two inequalities bound angles between the span and the true one. By Wedin's theorem (BIT 12, 1972) the sine of the
angle is at most the residual over δ, the distance of σ_k to the singular values of the rest. X V in float32
has a residual of about eps σ_1, which no route can undo: to the angle that is asked for, eps σ_1 / δ is added. Both
are of Frobenius norms, so k directions may have √k times the angle of one.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nufilt_jax.linalg.dense import gram, inner, matmul, scattered

# Root mean square angle, per direction, between certified and true directions, next to float32 rounding. Updates are
# held to 5e-5 of those in float64 (tests/core/test_solve.py): directions have to be better.
CERTIFIED_ANGLE = 1e-5
# Above this no gap is small enough to excuse it: the SVD decides.
WORST_ANGLE = 1e-2
# Random vectors that look for what the block misses altogether: a standard deviation of √(2/8) of their estimate where
# that is one direction, and less where it is many.
PROBES = 8
# Most that kept directions may couple with each other: as columns of a rank that the matrix does not have they would,
# by 1 and more.
MOST_COUPLED = 0.9
# By how many eps columns that are orthonormal to float32 may be off beside b: margin for narrow blocks. Newton-Schulz
# leaves 1 of 8 columns, 4 of 32 and 16 of 192.
SKEW_MARGIN = 16


class Spectrum(NamedTuple):
    """What the responses of a block tell of the singular values of X; where X has a lower rank, σ_k is the last used.

    Attributes:
      squares: ‖X v‖² of the columns to keep, about falling.
      used: which of them count: those above max(m, n) eps σ_1, as in `directions.rank_mask`.
      is_kept: the same, of all columns: null directions among the leading ones count as dropped.
      full: whether all that are to be kept count.
      top: σ_1².
      least: σ_b², to which no direction outside the block comes: ‖X v‖² of the weakest column, unless `bounded_by`
        knows better; 0 for a block of all.
      first: σ_1.
      last: σ_k.
      following: the strongest that is not kept.
      outer: the root of `least`.
    """

    squares: Float[Array, " k"]
    used: Bool[Array, " k"]
    is_kept: Bool[Array, " b"]
    full: Bool[Array, ""]
    top: Float[Array, ""]
    least: Float[Array, ""]
    first: Float[Array, ""]
    last: Float[Array, ""]
    following: Float[Array, ""]
    outer: Float[Array, ""]


class Certificate(NamedTuple):
    """What is known of the kept columns of a block; see the functions of the same names.

    Attributes:
      orthonormal: the block's columns were, before it was refined.
      separated: they do not couple with the rest of the block.
      corrected: nor with directions outside it.
      complete: no strong direction is missing from the block.
      independent: they do not hide that the rank is less.
    """

    orthonormal: Bool[Array, "*layers"]
    separated: Bool[Array, "*layers"]
    corrected: Bool[Array, "*layers"]
    complete: Bool[Array, "*layers"]
    independent: Bool[Array, "*layers"]

    @property
    def holds(self) -> Bool[Array, "*layers"]:
        """All five."""
        return self.orthonormal & self.separated & self.corrected & self.complete & self.independent


def spectrum_of(squares: Float[Array, " b"], rank: int, threshold: float) -> Spectrum:
    """Sorts the squared responses of a block's columns into kept and dropped ones.

    Args:
      squares: ‖X v‖², those to keep first.
      rank: how many those are.
      threshold: of what counts, relative to σ_1.
    """
    top, least = jnp.max(squares[:rank]), jnp.maximum(jnp.min(squares[rank:], initial=jnp.inf), 0)
    least = jnp.where(jnp.isfinite(least), least, 0)
    used = squares[:rank] > threshold**2 * top
    is_kept = jnp.pad(used, (0, len(squares) - rank))
    following = jnp.max(jnp.where(is_kept, 0, squares))
    last = jnp.min(jnp.where(used, squares[:rank], top))
    first, last, following, outer = (jnp.sqrt(square) for square in (top, last, following, least))
    return Spectrum(squares[:rank], used, is_kept, jnp.all(used), top, least, first, last, following, outer)


def orthonormal(block: Float[Array, "n b"]) -> Bool[Array, ""]:
    """‖QᵀQ − I‖ ≤ (b + 16) eps: the other four take norms within the block for norms of X.

    Rounding leaves about eps in each of the b² entries of QᵀQ, so b eps in their Frobenius norm.
    """
    b = block.shape[1]
    skew = jnp.linalg.norm(gram(block) - jnp.eye(b, dtype=block.dtype))
    return skew <= (b + SKEW_MARGIN) * jnp.finfo(block.dtype).eps


def separated(rotation: Float[Array, ""], spectrum: Spectrum) -> Bool[Array, ""]:
    """‖tan Θ‖ ≤ α + eps σ_1 / (σ_k − σ_next), and σ_k ≥ σ_next.

    The rotations that would decouple kept and dropped columns have these tangents: what is left of the angle within the
    block, as measured after the sweeps.

    Args:
      rotation: ‖tan Θ‖, over all pairs of a kept and a dropped column.
      spectrum: after the sweeps; only with the kept columns on the strong side is it the leading span that is kept.
    """
    return (rotation <= _allowed(spectrum, spectrum.following)) & (spectrum.last >= spectrum.following)


def corrected(left: Float[Array, "n k"], spectrum: Spectrum) -> Bool[Array, ""]:
    """‖what the correction leaves‖ ≤ α + eps σ_1 / (σ_k − σ_b).

    To first order v_j lacks r_j / (σ_j² − λ) of an outside direction of eigenvalue λ, with r_j = (I − QQᵀ) XᵀX v_j.
    Only 0 ≤ λ ≤ σ_b² is known. The correction takes λ = σ_b² / 2, and is wrong by no more than

        |1 / (σ_j² − λ) − 1 / (σ_j² − σ_b²/2)| ‖r_j‖ ≤ (σ_b² / 2) ‖r_j‖ / ((σ_j² − σ_b²) (σ_j² − σ_b²/2)).

    Args:
      left: the right-hand side, r_j itself in place of its norm.
      spectrum: of the block, whose weakest column has σ_b.
    """
    return jnp.linalg.norm(left) <= _allowed(spectrum, spectrum.outer)


def bounded_by(energy: Float[Array, ""], spectrum: Spectrum, outside: int) -> Spectrum:
    """The spectrum with a σ_b that holds: a block that got null directions in place of weak ones has others outside.

    Args:
      energy: of `energy_outside`.
      spectrum: of the block.
      outside: n − b. So many directions, none above σ_b, have at most (n − b) σ_b² together; one more for rounding.
    """
    least = jnp.where(energy > (outside + 1) * spectrum.least, energy, spectrum.least)
    return spectrum._replace(least=least, outer=jnp.sqrt(least))


def complete(energy: Float[Array, ""], spectrum: Spectrum, outside: int, threshold: float) -> Bool[Array, ""]:
    """‖X (I − QQᵀ)‖² ≤ (n − b + 1) σ_k², or ≤ max(m, n)² eps² σ_1² where X has fewer than k directions.

    No residual shows a singular vector at right angles to the whole block: its energy does. n − b directions outside,
    none stronger than the weakest one kept, have at most (n − b) σ_k²; one more, so that rounding passes where b = n.
    Where the rank is less, none may be there that would count.

    Args:
      energy: of `energy_outside`.
      spectrum: of the block.
      outside: n − b.
      threshold: max(m, n) eps.
    """
    most = (outside + 1) * jnp.min(spectrum.squares)
    return energy <= jnp.where(spectrum.full, most, threshold**2 * spectrum.top)


def independent(coupling: Float[Array, "k k"], used: Bool[Array, " k"]) -> Bool[Array, ""]:
    """max_i Σ_j≠i |cos(X v_i, X v_j)| ≤ 0.9, over the columns used: their responses have full rank.

    The cosines and a unit diagonal make up their Gram matrix, which Gershgorin's circles keep away from singular as
    long as no row sums to 1. Without this, two columns that mix one direction with a null one both count as used.

    Args:
      coupling: (X V)ᵀ X V of the kept columns, in any unit.
      used: which of them count.
    """
    size = jnp.sqrt(jnp.where(used, jnp.diagonal(coupling), 1))
    others = used[:, None] & used[None] & ~jnp.eye(len(used), dtype=bool)
    cosines = jnp.where(others, jnp.abs(coupling) / size[:, None] / size[None], 0)
    return jnp.max(jnp.sum(cosines, axis=1)) <= MOST_COUPLED


def _allowed(spectrum: Spectrum, other: Float[Array, ""]) -> Float[Array, ""]:
    """The angle that is allowed, `CERTIFIED_ANGLE` √k, and what rounding leaves at a distance of σ_k − `other`."""
    eps = jnp.finfo(spectrum.first.dtype).eps
    # Ties and a wrong order divide by the least that float32 can tell apart: allowed is then `WORST_ANGLE`.
    least_distance = jnp.where(spectrum.first > 0, eps * spectrum.first, 1)
    rounding = eps * spectrum.first / jnp.maximum(spectrum.last - other, least_distance)
    return jnp.minimum(CERTIFIED_ANGLE * len(spectrum.used) ** 0.5 + rounding, WORST_ANGLE)


def energy_outside(x: Float[Array, "m n"], block: Float[Array, "n b"], spectrum: Spectrum) -> Float[Array, ""]:
    """‖X (I − QQᵀ)‖² of a block Q, estimated: the mean over random vectors (Hutchinson, 1990).

    Where X has fewer directions than are kept, dropped columns may hide one between them, and are not taken for part
    of Q.

    Args:
      x: X, in the unit of `spectrum`.
      block: Q after the sweeps.
      spectrum: of the block.
    """
    block = jnp.where(spectrum.is_kept[None] | spectrum.full, block, 0)
    probes = scattered(x.shape[1], PROBES, x.dtype)  # the same for all layers: a result must not depend on the batch
    for _ in range(2):  # the second time for what rounding left
        probes -= matmul(block, inner(block, probes))
    return jnp.sum(matmul(x, probes) ** 2) / PROBES
