"""Step 3, fusion: the update τ (P + BA) of the merged weights (Eq. 10, arXiv:2509.21413v2)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from nufilt_jax.core.adapt import Adapter
from nufilt_jax.core.settings import RightFactor
from nufilt_jax.linalg.dense import inner, matmul, norm, product_norm
from nufilt_jax.linalg.factored import Matrix, rows_of, with_rows


class Fused(NamedTuple):
    """One layer's update, and what the forecast tells of it.

    Attributes:
      update: τ (F + BA), F = P, I or 0.
      removed: ‖τ V2‖ if the filter took it away, else 0.
      restored: ‖τ B A‖.
      felt: τ B A V2, by the rows of τ.
    """

    update: Float[Matrix, "*layers m n"]
    removed: Float[Array, "*layers"]
    restored: Float[Array, "*layers"]
    felt: Float[Array, "*layers rows r_p"]


def fuse(
    right_factor: RightFactor, task_delta: Float[Matrix, "m n"], adapter: Adapter, prior: Float[Array, "n r_p"]
) -> Fused:
    """Update of one layer's merged weights: τ + [−τ V2, τ B] [V2, Aᵀ]ᵀ. Neither projector nor B A is ever built.

    Args:
      right_factor: F + BA.
      task_delta: τ.
      adapter: B and A.
      prior: V2.
    """
    at, b = adapter
    rows = rows_of(task_delta)
    if right_factor == "P + BA":
        # τ is read once for both responses and the update written once: on a CPU this stage waits for memory.
        k = prior.shape[1]
        responses = matmul(rows, jnp.concatenate([prior, b], axis=1))
        removed, left = responses[:, :k], responses[:, k:]
        pieces = jnp.concatenate([-removed, left], axis=1), jnp.concatenate([prior, at], axis=1)
    else:
        # Of no entries, so that its norm is 0: nothing was taken away.
        removed, left = jnp.zeros((0, 0), rows.dtype), matmul(rows, b)
        pieces = left, at
    change = matmul(pieces[0], pieces[1].T)
    return Fused(
        update=with_rows(task_delta, change if right_factor == "BA" else rows + change),
        removed=norm(removed),
        restored=product_norm(left, at),
        # (A V2) first: r_l rows, whatever n is.
        felt=matmul(left, inner(at, prior)),
    )
