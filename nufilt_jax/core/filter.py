"""Step 1, the null-space filter: P = I − V2 V2ᵀ, applied without being built (Eqs. 7-8, arXiv:2509.21413v2).

Also what stands in its place in row 3 of Table 4, the objective alone: the identity, or nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from nufilt_jax.config import RightFactor
from nufilt_jax.core.linalg import matmul


class Kept(NamedTuple):
    """What the update keeps of τ before an adapter is added: τ F, with F = P, I or 0.

    Attributes:
      update: τ F.
      target: C, what τ B A V should be, in the columns of V = [V2 V1] where that is not zero: those of V1 or all.
      felt: τ F V2, what the directions of the earlier tasks feel of it; None if that is zero by construction.
      removed: ‖τ V2‖² if the filter took it away, else 0.
    """

    update: Float[Array, "*layers m n"]
    target: Float[Array, "*layers m pulled"]
    felt: Float[Array, "*layers m r_p"] | None
    removed: Float[Array, "*layers"]


def keep(
    right_factor: RightFactor,
    task_delta: Float[Array, "m n"],
    prior: Float[Array, "n r_p"],
    new: Float[Array, "n r_v"],
    new_response: Float[Array, "m r_v"],
    merged_response: Float[Array, "m r_v"],
) -> Kept:
    """Keeps of a task vector what stands beside B A in the right factor.

    The loss ‖(τ − D − τ(F + BA)) V1‖² + ‖τ(F + BA) V2‖² (Eq. 16 in two blocks, arXiv:2509.21413v2) is ‖τ B A V − C‖²
    with C = [−τ F V2, (τ − D − τ F) V1].

    Args:
      right_factor: F + BA.
      task_delta: τ.
      prior: V2.
      new: V1.
      new_response: τ V1.
      merged_response: D V1.
    """
    if right_factor == "P + BA":
        filtered, removed = null_space_filter(task_delta, prior)
        target = matmul(removed, matmul(prior.T, new)) - merged_response
        return Kept(filtered, target, None, jnp.sum(removed**2))
    nothing = jnp.zeros((), task_delta.dtype)
    if right_factor == "BA":
        return Kept(jnp.zeros_like(task_delta), new_response - merged_response, None, nothing)
    felt = matmul(task_delta, prior)
    return Kept(task_delta, -jnp.concatenate([felt, merged_response], axis=1), felt, nothing)


def null_space_filter(
    task_delta: Float[Array, "m n"], prior: Float[Array, "n k"]
) -> tuple[Float[Array, "m n"], Float[Array, "m k"]]:
    """Removes from a task vector the input directions that the merged model uses most.

    Source: Eqs. (7) and (8), arXiv:2509.21413v2.

    Args:
      task_delta: τ = θ_t − θ0 of one layer.
      prior: V2, orthonormal columns; zero columns remove nothing.

    Returns:
      τ P, and the response τ V2 that was taken away.
    """
    removed = matmul(task_delta, prior)
    return task_delta - matmul(removed, prior.T), removed


def authors_first_filter(task_delta: Float[Array, "m n"], rank: int) -> Float[Array, "m n"]:
    """What the authors' program does to the very first task: its first `rank` input coordinates are deleted.

    The right singular vectors of a zero matrix come out of their solver as the identity (spec of `first_task`).
    """
    return task_delta.at[:, :rank].set(0)
