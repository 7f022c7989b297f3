"""Step 3, fusion: the update τ (P + BA) of the merged weights (Eq. 10, arXiv:2509.21413v2)."""

from jaxtyping import Array, Float

from nufilt_jax.core.adapt import Adapter
from nufilt_jax.core.linalg import matmul


def fuse(
    task_delta: Float[Array, "m n"], kept: Float[Array, "m n"], adapter: Adapter, prior: Float[Array, "n r_p"]
) -> tuple[Float[Array, "m n"], Float[Array, "m n"], Float[Array, "m r_p"]]:
    """Update of one layer's merged weights: τ P + (τ B) A. Neither projector nor B A is ever built.

    Args:
      task_delta: τ.
      kept: τ P, or what stands in its place.
      adapter: B and A.
      prior: V2.

    Returns:
      The update, the part of it that the adapter put there, and what V2 feels of that part.
    """
    left = matmul(task_delta, adapter.b)
    restored = matmul(left, adapter.at.T)
    return kept + restored, restored, matmul(left, matmul(adapter.at.T, prior))
