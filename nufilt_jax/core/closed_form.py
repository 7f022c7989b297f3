"""Step 2 without training: the smallest correction that answers the surrogate, written down (ours; not in the paper).

With E in place of τ B A, the surrogate (Eq. 16, arXiv:2509.21413v2) asks for E V1 = C and E V2 = 0. The matrices with
E V2 = 0 are those of the form F P, and the least ‖F P V1 − C‖² + λ ‖F P‖² over F, a ridge regression, is at

    E = C (S + λ I)⁻¹ V1ᵀ P,    S = V1ᵀ P V1.

S has its eigenvalues in [0, 1], so λ has no unit. With this E the surrogate is ‖λ C (S + λ I)⁻¹‖².
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nufilt_jax.linalg.dense import inner, matmul


def smallest_correction(
    target: Float[Array, "m r_v"],
    prior: Float[Array, "n r_p"],
    task: Float[Array, "n r_v"],
    *,
    ridge: Float[Array, ""] | float,
) -> tuple[Float[Array, "m r_v"], Float[Array, "n r_v"], Float[Array, "2"]]:
    """The minimiser of the surrogate plus λ ‖E‖² among all E with E V2 = 0.

    Args:
      target: C of `core.filter`, with the filter.
      prior: V2, orthonormal columns; zero columns ask for nothing.
      task: V1, likewise; where a column is zero, C has a zero column too.
      ridge: λ.

    Returns:
      L and R of E = L Rᵀ, and the surrogate without and with it.
    """
    free = task
    for _ in range(2):  # P V1; done once, rounding would leave something of V2, and a small λ make much of it
        free = free - matmul(prior, inner(prior, free))
    # (S + λ I)⁻¹ = g (g S + (1 − g) I)⁻¹: a matrix with eigenvalues in [1 − g, 1], whatever λ is.
    gain, rest = _weights(ridge)
    answer = matmul(target, blended_inverse(free, ridge=ridge))
    # λ g = 1 − g.
    losses = jnp.stack([jnp.sum(target**2), jnp.sum((rest * answer) ** 2)])
    return gain * answer, free, losses


def _weights(ridge: Float[Array, ""] | float) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The gain g = 1 / (1 + λ) and 1 − g, each to rounding of its own, as the difference of a small λ would not be."""
    ridge = jnp.asarray(ridge, jnp.float32)
    return 1 / (1 + ridge), 1 / (1 + 1 / ridge)


def blended_inverse(x: Float[Array, "n k"], *, ridge: Float[Array, ""] | float) -> Float[Array, "k k"]:
    """(g XᵀX + (1 − g) I)⁻¹, g = 1 / (1 + λ), for singular values of X in [0, 1], by Newton's iteration (Schulz, 1933).

    The error squares at every step, from a start at which it is g / (2 − g): the steps to float32 rounding are known
    beforehand, 4 for a gain of 1/2. They are products alone, so no LAPACK call has to wait for others; and since XᵀX
    is not formed, they lose less to rounding than a Cholesky factor of it does.
    """
    gain, rest = _weights(ridge)
    # g / (2 − g) = 1 / (1 + 2 λ).
    squarings = jnp.log2(-jnp.log(jnp.finfo(x.dtype).eps) / jnp.log1p(2 * jnp.asarray(ridge, x.dtype)))
    n_steps = jnp.maximum(jnp.ceil(squarings), 0).astype(int)

    def step(_: Int[Array, ""], y: Array) -> Array:
        return 2 * y - matmul(y, gain * inner(x, matmul(x, y)) + rest * y)

    # 2 over the sum of the extreme eigenvalues, 1 and 1 − g: no other multiple of the identity starts as near.
    return jax.lax.fori_loop(0, n_steps, step, 2 / (2 - gain) * jnp.eye(x.shape[1], dtype=x.dtype))
