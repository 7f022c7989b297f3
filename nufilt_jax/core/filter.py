"""Step 1, the null-space filter: P = I − V2 V2ᵀ, applied without being built (Eqs. 7-8, arXiv:2509.21413v2)."""

from jaxtyping import Array, Float

from nufilt_jax.core.linalg import matmul


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
