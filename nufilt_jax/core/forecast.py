"""What can be told of a layer's step without any data."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Forecast(NamedTuple):
    """One step of a batch of layers. Shares are of squared Frobenius norms.

    Attributes:
      removed_share: of τ that the filter removes, ‖τ V2‖² / ‖τ‖²; 0 without one.
      restored_share: of τ that the adapter adds, ‖τ B A‖² / ‖τ‖².
      drift: change of the merged model's response on its kept directions, ‖Δ V2‖² / ‖D V2‖².
      cut_gap: relative gap of D's spectrum at the cut; near 0 the choice of directions is arbitrary.
      captured: share of D that its kept directions hold, ‖D V2‖² / ‖D‖²; 1 if D is zero.
      certified: whether all directions were certified, so that no SVD was needed.
    """

    removed_share: Float[Array, " layers"]
    restored_share: Float[Array, " layers"]
    drift: Float[Array, " layers"]
    cut_gap: Float[Array, " layers"]
    captured: Float[Array, " layers"]
    certified: Bool[Array, " layers"]


def share(part: Float[Array, ""], whole: Float[Array, ""], *, of_nothing: int = 0) -> Float[Array, ""]:
    """(`part` / `whole`)² of two norms, or `of_nothing` if `whole` is zero: their squares alone may overflow."""
    return jnp.where(whole > 0, (part / jnp.where(whole > 0, whole, 1)) ** 2, of_nothing)
