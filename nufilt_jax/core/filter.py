"""Step 1, the null-space filter: P = I − V2 V2ᵀ, applied without being built (Eqs. 7-8, arXiv:2509.21413v2).

Also what stands in its place in row 3 of Table 4, the objective alone: the identity, or nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from nufilt_jax.core.settings import RightFactor
from nufilt_jax.linalg.dense import inner, matmul
from nufilt_jax.linalg.factored import Matrix, by_outputs, rows_of, with_rows


class Target(NamedTuple):
    """What the filtered task vector τ F, with F = P, I or 0, leaves for an adapter to do.

    Attributes:
      wanted: C, what τ B A V should be, in the columns of V = [V2 V1] where that is not zero: those of V1 or all.
      felt: τ F V2, what the directions of the earlier tasks feel of τ F, by the rows of τ; None if that is zero by
        construction.
    """

    wanted: Float[Array, "*layers m pulled"]
    felt: Float[Array, "*layers rows r_p"] | None  # known while tracing: no zeros are multiplied


def target(
    right_factor: RightFactor,
    merged_delta: Float[Matrix, "m n"],
    task_delta: Float[Matrix, "m n"],
    prior: Float[Array, "n r_p"],
    new: Float[Array, "n r_v"],
) -> Target:
    """The target of the adapter, which needs no filtered task vector.

    The loss ‖(τ − D − τ(F + BA)) V1‖² + ‖τ(F + BA) V2‖² (Eq. 16 in two blocks, arXiv:2509.21413v2) is ‖τ B A V − C‖²
    with C = [−τ F V2, τ (I − F) V1 − D V1].

    Args:
      right_factor: F + BA.
      merged_delta: D.
      task_delta: τ.
      prior: V2.
      new: V1.
    """
    rows = rows_of(task_delta)
    merged_response = by_outputs(merged_delta, matmul(rows_of(merged_delta), new))
    if right_factor == "I + BA":
        # F = I leaves nothing of τ (I − F), but what V2 feels of τ is for the adapter to undo.
        felt = matmul(rows, prior)
        return Target(-jnp.concatenate([by_outputs(task_delta, felt), merged_response], axis=1), felt)
    # (I − F) V1, for F = P and F = 0. V2 (V2ᵀ V1) before τ: products with r_v columns, and no n × n projector.
    missing = matmul(prior, inner(prior, new)) if right_factor == "P + BA" else new
    return Target(by_outputs(task_delta, matmul(rows, missing)) - merged_response, None)


def null_space_filter(
    task_delta: Float[Matrix, "m n"], prior: Float[Array, "n k"]
) -> tuple[Float[Matrix, "m n"], Float[Array, "rows k"]]:
    """Removes from a task vector the input directions that the merged model uses most.

    Source: Eqs. (7) and (8), arXiv:2509.21413v2.

    Args:
      task_delta: τ = θ_t − θ0 of one layer.
      prior: V2, orthonormal columns; zero columns remove nothing.

    Returns:
      τ P, and the response τ V2 that was taken away, by the rows of τ.
    """
    # (τ V2) V2ᵀ takes 4 m n r_p flops; τ (V2 V2ᵀ) would take 2 m n² and n² numbers of memory.
    rows = rows_of(task_delta)
    removed = matmul(rows, prior)
    return with_rows(task_delta, rows - matmul(removed, prior.T)), removed


def authors_first_filter(task_delta: Float[Matrix, "m n"], rank: int) -> Float[Matrix, "m n"]:
    """What the authors' program does to the very first task: its first `rank` input coordinates are deleted.

    The right singular vectors of a zero matrix come out of their solver as the identity (spec of `first_task`).
    """
    return with_rows(task_delta, rows_of(task_delta).at[:, :rank].set(0))
