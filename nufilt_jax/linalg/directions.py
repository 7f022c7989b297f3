"""Leading right singular vectors as they are found, by whichever route: the reference, and what all routes share."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nufilt_jax.linalg.dense import matmul, thin_svd
from nufilt_jax.linalg.dispatch import after
from nufilt_jax.linalg.stacks import Stacks, bounds, joined

# Up to this many inputs `auto` takes a full decomposition: see `subspace.route`.
FULL_WIDTH = 256


class Directions(NamedTuple):
    """Leading right singular vectors of a batch of matrices.

    Attributes:
      vectors: orthonormal columns that span the leading directions.
      sizes: ‖X v‖ of each, as measured: the root of a Gram eigenvalue would be rounding noise where X is small.
      gap: relative distance of the last singular value kept to the next one. Near 0 the cut falls among equals
        and which directions are kept is arbitrary.
      certified: false where the route in hand gave no certificate; then the SVD took over, if it was to.
    """

    vectors: Float[Array, "*layers n k"]
    sizes: Float[Array, "*layers k"]
    gap: Float[Array, "*layers"]
    certified: Bool[Array, "*layers"]


def leading_by_svd(stacks: Stacks, rank: int) -> Directions:
    """Reference route: thin SVDs of the matrices themselves, one stack after another."""

    def thin(x: Float[Array, "layers m n"], _: int, __: int) -> Directions:
        _u, s, vt = thin_svd(x)
        leading = jnp.swapaxes(vt[:, :rank], 1, 2)
        # With fewer outputs than directions the rest stays zero: it is unused by definition.
        rest = (0, min(rank, x.shape[2]) - leading.shape[2])
        vectors, sizes = jnp.pad(leading, ((0, 0), (0, 0), rest)), jnp.pad(s[:, :rank], ((0, 0), rest))
        return Directions(vectors, sizes, relative_gap(s, rank), jnp.ones(len(x), bool))

    return in_turn(thin, stacks)


def in_turn(solve: Callable[[Array, int, int], Directions], stacks: Stacks) -> Directions:
    """`solve(stack, first layer, last layer + 1)` for each stack, none before the one before it is through."""
    parts: list[Directions] = []
    for stack, (i, j) in zip(stacks, bounds(stacks), strict=True):
        parts.append(solve(after(stack, parts[-1].vectors) if parts else stack, i, j))
    return joined(parts)


def first_of(found: Directions, stacks: Stacks, rank: Int[Array, ""]) -> Directions:
    """The leading `rank` of more directions that are exact as a span; `rank` is data, and the others become zero.

    Args:
      found: of `stacks`.
      stacks: the matrices X.
      rank: more than there are takes all.
    """
    most = found.vectors.shape[2]
    if most == 0:
        return found

    def cut(x: Float[Array, "layers m n"], i: int, j: int) -> Directions:
        span = found.vectors[i:j]
        within = leading_by_svd((matmul(x, span),), most)
        turned, s = matmul(span, within.vectors), within.sizes
        is_first = jnp.arange(most) < rank
        last, following = (jnp.take(s, jnp.clip(at, 0, most - 1), axis=1) for at in (rank - 1, rank))
        is_inside = (rank < most) & (last > 0)
        gap = jnp.where(is_inside, (last - following) / jnp.where(last > 0, last, 1), 1)
        gap = jnp.where(rank >= most, found.gap[i:j], gap)
        return Directions(
            jnp.where(is_first[None, None], turned, 0), jnp.where(is_first[None], s, 0), gap, found.certified[i:j]
        )

    waiting = tuple(after(x, found.vectors) for x in stacks)
    return in_turn(cut, waiting)


def relative_gap(s: Float[Array, "layers k"], rank: int) -> Float[Array, " layers"]:
    """(σ_rank − σ_rank+1) / σ_rank, 1 where nothing is cut off."""
    if rank >= s.shape[-1]:
        return jnp.ones(s.shape[0], s.dtype)
    last = s[:, rank - 1]
    return jnp.where(last > 0, (last - s[:, rank]) / jnp.where(last > 0, last, 1), 1)


def rank_mask(found: Directions, outputs: int) -> Directions:
    """Sets directions of one matrix that it does not really use to zero.

    A direction counts if ‖X v_k‖ > max(m, n) eps σ_1. A mask and not a slice: one program serves all ranks.

    Args:
      found: directions, without a layer axis.
      outputs: m.
    """
    n, k = found.vectors.shape
    if k == 0:
        return found
    # The largest, not the first: refined columns are only about in order.
    used = found.sizes > jnp.max(found.sizes) * max(outputs, n) * jnp.finfo(found.sizes.dtype).eps
    return found._replace(vectors=jnp.where(used[None], found.vectors, 0), sizes=jnp.where(used, found.sizes, 0))
