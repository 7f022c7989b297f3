"""TSV-M, merging by task singular vectors, one task vector at a time: Gargiulo et al., arXiv:2412.00081.

Settings and the continual form are those of the authors of arXiv:2509.21413v2: the operands are D and τ whatever the
step, so older tasks are truncated again each time.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from nufilt_jax.linalg.dense import matmul, thin_svd
from nufilt_jax.linalg.dispatch import after
from nufilt_jax.methods.matrices import matrices_or_mean
from nufilt_jax.methods.selection import every_tensor
from nufilt_jax.methods.stacked import TaskVector
from nufilt_jax.methods.state import Advance, Context, MergeState, Rule, ScaledConfig, scaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class TsvMConfig(ScaledConfig):
    """TSV-M, merging by task singular vectors.

    Attributes:
      scale: factor on the merged vector; 1 in the authors' settings, absent from Table 9.
    """

    scale: float = 1.0


def advance(state: MergeState, task: TaskVector, context: Context[TsvMConfig]) -> Advance:
    """θ0 + λ U diag(σ) Vᵀ for matrices, θ0 + λ (D + τ)/2 for all other tensors."""
    return Advance(matrices_or_mean(_merge, state.delta, task, context))


def _merge(d: Float[Array, "m n"], t: Float[Array, "m n"], *, config: TsvMConfig) -> Float[Array, "m n"]:
    """λ U diag(σ) Vᵀ: half of the singular triples of D and half of τ's, their vectors made orthonormal.

    The published zero column that fills up an odd min(m, n) is left out: its singular value is zero. A matrix of one
    row or column has no half to keep and becomes zero.
    """
    # Half of each, whatever the step: there are always two operands.
    k = min(d.shape) // 2
    if k == 0:
        return jnp.zeros_like(d)
    u_d, s_d, v_d = _leading(d, k)
    u_t, s_t, v_t = _leading(after(t, s_d), k)
    u = _polar(jnp.concatenate([u_d, u_t], axis=1))
    v = _polar(after(jnp.concatenate([v_d, v_t], axis=1), u))  # one decomposition at a time, see `dispatch.after`
    return config.scale * matmul(u * jnp.concatenate([s_d, s_t])[None], v.T)


def _leading(x: Float[Array, "m n"], k: int) -> tuple[Float[Array, "m k"], Float[Array, " k"], Float[Array, "n k"]]:
    """U, σ and V of the k largest singular values.

    Where X has fewer, the rest is zero: the SVD picks null vectors at will, and kept as columns they would turn the
    others. A mask, since one program serves all ranks.
    """
    u, s, vt = thin_svd(x)
    used = ~(s <= s[0] * max(x.shape) * jnp.finfo(x.dtype).eps)[:k]  # NaN too, so that it comes out
    return (
        jnp.where(used[None], u[:, :k], 0),
        jnp.where(used, s[:k], 0),
        jnp.where(used[None], vt[:k].T, 0),
    )


def _polar(x: Float[Array, "m k"]) -> Float[Array, "m k"]:
    """P Qᵀ of the thin SVD X = P Σ Qᵀ: the nearest matrix with orthonormal columns.

    From the SVD and not from an inverse root of XᵀX, which zero columns make singular.
    """
    p, _, qt = thin_svd(x)
    return matmul(p, qt)


RULE = Rule(
    name="tsv_m",
    config=TsvMConfig,
    first=scaled,  # nothing truncated
    advance=advance,
    scope=every_tensor,
    update="θ0 + λ U S Vᵀ: half of D's and of τ's singular triples, made orthogonal; vectors: λ (D + τ)/2",
    touches="every tensor",
    cost="4 thin SVDs",
    source="Gargiulo et al., arXiv:2412.00081",
    workspace=3.0,
    spreads=True,
)
