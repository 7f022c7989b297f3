"""Corrects leading eigenvectors of XᵀX to the accuracy of an SVD of X, and certifies them.

Forming XᵀX squares the spectrum, and float32 cannot tell its small end from rounding: where σ_k falls fast, the span
of the first eigenvectors is far off. X V, measured directly, shows how the vectors still couple.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nufilt_jax.linalg.certificate import (
    Certificate,
    Spectrum,
    bounded_by,
    complete,
    corrected,
    energy_outside,
    independent,
    orthonormal,
    separated,
    spectrum_of,
)
from nufilt_jax.linalg.dense import eigh_descending, gram, inner, matmul, orthonormalize, unit_scale
from nufilt_jax.linalg.programs import by_platform

# Sweeps of rotations within the block. Between 64 directions of `eigh` and the next 32 of σ ∝ k^-1.5, n = 300, they
# measure 8e-3, 4e-5 and 3e-6: the last is rounding. Between 8 and 24 of a flatter one the third was 5e-5 still.
SWEEPS = 4
# Directions on either side of the cut that each sweep sorts out exactly: rotations to first order do not sort near
# ties. Without it, the same couplings grow from 0.65 to 1.0.
CUT_WINDOW = 32
# As many on a GPU: cuSOLVER takes the eigenvectors of all layers in one call, if they have at most 32 columns, and else
# layer after layer. Hardly any more layers are then left to the second program.
CUT_WINDOW_ON_GPU = 16
# Rotations of one sweep together: more would leave the vectors far from orthonormal.
MOST_ROTATION = 0.5


class Refined(NamedTuple):
    """A block whose leading columns are separated from the rest of it and from what is outside.

    Attributes:
      block: nearly orthonormal; its first k columns, those kept, are corrected and orthonormal.
      sizes: ‖X v‖ of these, measured before the correction, whose square is all it changes there.
      gap: the relative gap at the cut.
      certificate: of the kept columns. Where it does not hold, once more may help.
    """

    block: Float[Array, "*layers n b"]
    sizes: Float[Array, "*layers k"]
    gap: Float[Array, "*layers"]
    certificate: Certificate


def refine(x: Float[Array, "m n"], block: Float[Array, "n b"], rank: int) -> Refined:
    """Separates the leading `rank` right singular vectors of X from the rest of a block that nearly contains them.

    Within the block, sweeps over the b x b matrix of responses: a small eigenproblem for the directions next to the
    cut, and simultaneous Jacobi rotations for all other pairs (in the manner of Ogita and Aishima, Japan J. Indust.
    Appl. Math. 35, 2018). Then one correction, to first order, from outside the block. Where X has a lower rank, its
    null directions count as the rest, also those among the leading ones.

    Args:
      x: the matrix.
      block: orthonormal columns, approximate singular vectors, the strongest first.
      rank: how many to keep; at most b, and less unless b = n.
    """
    unit = unit_scale(x)
    threshold = float(max(x.shape) * jnp.finfo(x.dtype).eps)  # of the rank, relative to σ_1
    turned = _turned(x, block, rank, unit, threshold)
    spectrum = spectrum_of(turned.squares, rank, threshold)
    energy = energy_outside(unit * x, turned.block, spectrum)
    outside = x.shape[1] - block.shape[1]
    spectrum = bounded_by(energy, spectrum, outside)
    missing, left = _correction(x, turned, spectrum, unit)
    certificate = Certificate(
        orthonormal=orthonormal(block),
        separated=separated(turned.rotation, spectrum),
        corrected=corrected(left, spectrum),
        complete=complete(energy, spectrum, outside, threshold),
        independent=independent(turned.coupling[:rank, :rank], spectrum.used),
    )
    cut = spectrum.full & (spectrum.last > 0) & (rank < min(x.shape))
    gap = jnp.where(cut, (spectrum.last - spectrum.following) / jnp.where(spectrum.last > 0, spectrum.last, 1), 1)
    # Two steps: the correction and the rotations, of first order, leave columns that are nearly orthonormal.
    kept = orthonormalize(turned.block[:, :rank] + missing, 2)
    sizes = jnp.linalg.norm(turned.response, axis=0) / unit[0]
    return Refined(jnp.concatenate([kept, turned.block[:, rank:]], axis=1), sizes, gap, certificate)


class _Turned(NamedTuple):
    """A block after the sweeps, responses in a unit of the layer's own.

    Attributes:
      block: its columns V.
      response: X V of those to keep.
      coupling: (X V)ᵀ X V of all, of trace 1.
      squares: ‖X v‖².
      rotation: size of the rotations that would still decouple kept and dropped columns.
    """

    block: Float[Array, "n b"]
    response: Float[Array, "m k"]
    coupling: Float[Array, "b b"]
    squares: Float[Array, " b"]
    rotation: Float[Array, ""]


def _turned(
    x: Float[Array, "m n"], block: Float[Array, "n b"], rank: int, unit: Float[Array, "1 1"], threshold: float
) -> _Turned:
    """Turns a block so that its leading columns respond apart from the others."""
    response = unit * matmul(x, block)
    coupling, _ = _coupling(response)

    def sweep(_: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        wide, narrow = (
            functools.partial(_sweep, rank=rank, threshold=threshold, half=half)
            for half in (CUT_WINDOW, CUT_WINDOW_ON_GPU)
        )
        step, coupling = by_platform(state[1], cuda=narrow, default=wide)
        return matmul(state[0], step), coupling

    # A loop of the program: written out, each sweep would be compiled anew.
    turn, _ = jax.lax.fori_loop(0, SWEEPS, sweep, (jnp.eye(block.shape[1], dtype=x.dtype), coupling))
    # Measured, not taken from the sweeps: what they carry along of weak directions drowns in rounding of strong ones.
    response = matmul(response, turn)
    coupling, scale = _coupling(response)
    rotation = jnp.linalg.norm(_tangents(coupling, rank, threshold))
    return _Turned(matmul(block, turn), response[:, :rank], coupling, jnp.diagonal(coupling) * scale, rotation)


def _coupling(response: Float[Array, "m b"]) -> tuple[Float[Array, "b b"], Float[Array, ""]]:
    """RᵀR of trace 1, and its trace: entries are as exact as the directions they belong to are large."""
    coupling = gram(response)
    scale = jnp.trace(coupling)
    return coupling / jnp.where(scale > 0, scale, 1), scale


def _correction(
    x: Float[Array, "m n"], turned: _Turned, spectrum: Spectrum, unit: Float[Array, "1 1"]
) -> tuple[Float[Array, "n k"], Float[Array, "n k"]]:
    """What the kept columns lack of directions outside the block, and a bound on what they still lack with it.

    Both to first order, and derived at `certificate.corrected`. Null directions lack nothing.
    """
    outside = unit * inner(x, turned.response)
    outside -= matmul(turned.block, inner(turned.block, outside))
    # An outside direction of eigenvalue λ, 0 <= λ <= least, is missing by outside / (σ² − λ): take the middle for λ.
    floor = jnp.finfo(x.dtype).eps * spectrum.top
    middle, nearest = (jnp.maximum(spectrum.squares - part * spectrum.least, floor) for part in (0.5, 1))
    middle, nearest = (jnp.where(distance > 0, distance, 1) for distance in (middle, nearest))
    missing = jnp.where(spectrum.used[None], outside / middle[None], 0)
    left = jnp.where(spectrum.used[None], outside / nearest[None], 0) * (spectrum.least / 2 / middle)[None]
    return missing, left


def _sweep(
    coupling: Float[Array, "b b"], *, rank: int, threshold: float, half: int
) -> tuple[Float[Array, "b b"], Float[Array, "b b"]]:
    """One orthogonal (to first order) turn of the block towards decoupled kept and dropped sets.

    Kept are the leading directions that X uses; what it does not use is a null direction, which the rank mask drops.

    Returns:
      The turn, and the coupling after it.
    """
    b = coupling.shape[0]
    width = min(half, rank, b - rank)
    window = slice(rank - width, rank + width)
    u = jnp.zeros((0, 0), coupling.dtype)
    if width > 0:  # something is cut off
        near = coupling[window, window]
        scale = jnp.max(jnp.abs(near))
        _, u = eigh_descending(near / jnp.where(scale > 0, scale, 1))
        coupling = coupling.at[:, window].set(matmul(coupling[:, window], u))
        coupling = coupling.at[window].set(inner(u, coupling[window]))
    tangent = _tangents(coupling, rank, threshold)
    # One factor for all: a common shorter step keeps its direction.
    size = jnp.linalg.norm(tangent)
    tangent *= jnp.minimum(1, MOST_ROTATION / jnp.maximum(size, jnp.finfo(size.dtype).eps))
    rotation = jnp.eye(b, dtype=coupling.dtype) + tangent - tangent.T
    coupling = inner(rotation, matmul(coupling, rotation))
    # The window's turn first, then the rotations.
    return rotation.at[window].set(matmul(u, rotation[window])), coupling


def _tangents(coupling: Float[Array, "b b"], rank: int, threshold: float) -> Float[Array, "b b"]:
    """Of the rotations that would decouple each pair of a dropped (row) and a kept column, were it alone; else 0."""
    squares = jnp.diagonal(coupling)
    is_kept = (squares > threshold**2 * jnp.max(squares)) & (jnp.arange(len(squares)) < rank)
    distance = squares[None] - squares[:, None]
    root = jnp.sqrt(distance**2 + 4 * coupling**2)
    # The smaller of the two angles that decouple a pair, in the form without cancellation (Rutishauser, 1966).
    tangent = 2 * coupling / jnp.where(root > 0, distance + jnp.where(distance < 0, -root, root), 1)
    return jnp.where(is_kept[None] & ~is_kept[:, None], tangent, 0)
