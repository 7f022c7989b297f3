"""Iso-C, isotropic merging, one task vector at a time: Marczak et al., arXiv:2502.04959.

Settings and the continual form are those of the authors of arXiv:2509.21413v2, whose paper gives no formula.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from nufilt_jax.linalg.dense import matmul, thin_svd
from nufilt_jax.methods.matrices import matrices_or_mean
from nufilt_jax.methods.selection import every_tensor
from nufilt_jax.methods.stacked import TaskVector
from nufilt_jax.methods.state import Advance, Context, MergeState, Rule, ScaledConfig, scaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsoCConfig(ScaledConfig):
    """Iso-C, isotropic merging.

    Attributes:
      scale: factor on the isotropic sum; 1 in the authors' settings, absent from Table 9.
    """

    scale: float = 1.0  # joint merging tunes it to 1.3-1.5; a factor at every step would be raised to a power


def advance(state: MergeState, task: TaskVector, context: Context[IsoCConfig]) -> Advance:
    """θ0 + λ Iso(D + τ) for matrices, θ0 + λ (D + τ)/2 for all other tensors."""
    return Advance(matrices_or_mean(_isotropic, state.delta, task, context))


def _isotropic(d: Float[Array, "m n"], t: Float[Array, "m n"], *, config: IsoCConfig) -> Float[Array, "m n"]:
    """λ σ̄ U Vᵀ of C = D + τ, σ̄ the mean of all min(m, n) singular values.

    Zero for C = 0. The directions that a rank-deficient C does not use get σ̄ too, and there U and V are arbitrary.
    """
    # The sum, not the mean, as in the authors' program: σ̄ grows with the number of tasks.
    u, s, vt = thin_svd(d + t)
    return config.scale * jnp.mean(s) * matmul(u, vt)


RULE = Rule(
    name="iso_c",
    config=IsoCConfig,
    first=scaled,  # not made isotropic
    advance=advance,
    scope=every_tensor,
    update="θ0 + λ s U Vᵀ: all singular values of D + τ set to their mean s; vectors: λ (D + τ)/2",
    touches="every tensor",
    cost="1 thin SVD",
    source="Marczak et al., arXiv:2502.04959",
    workspace=3.0,
    spreads=True,
)
