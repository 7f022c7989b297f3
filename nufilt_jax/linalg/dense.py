"""Dense products and decompositions of whole batches.

Everything here takes leading batch axes; a batch is one operation.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nufilt_jax.linalg.programs import by_platform

# Of the powers of two that `unit_scale` scales by: their squares stay normal float32 numbers, 2⁻¹²⁶ to 2¹²⁷.
_MOST_EXPONENT = 63
# Of all products, when they are traced: true float32, where accelerators would round to TF32 or bfloat16.
PRECISION: Any = jax.lax.Precision.HIGHEST
# Half the width of a matrix from which on symmetry saves more than two more products cost.
LEAST_HALF = 192


def matmul(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """Matrix product in full float32."""
    return jnp.matmul(a, b, precision=PRECISION)


def inner(a: Float[Array, "*batch m i"], b: Float[Array, "*batch m j"]) -> Float[Array, "*batch i j"]:
    """AᵀB in full float32: the inner products of the columns of two matrices.

    One operation. As a product with a transposed A, XLA's CPU compiler may copy a single A for each product in a loop.
    """
    batch = tuple(range(a.ndim - 2))
    rows = ((a.ndim - 2,), (b.ndim - 2,))
    return jax.lax.dot_general(a, b, (rows, (batch, batch)), precision=PRECISION)


def transpose(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch n m"]:
    """The last two axes exchanged."""
    return jnp.swapaxes(x, -1, -2)


def gram(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch n n"]:
    """XᵀX; on a CPU, of wide matrices, the half above the diagonal is copied from below."""
    if x.shape[-1] // 2 < LEAST_HALF:
        return _whole_gram(x)
    # On a TPU every product in a program takes seconds to compile.
    return by_platform(x, cpu=_gram_by_halves, default=_whole_gram)


def _whole_gram(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch n n"]:
    return inner(x, x)


def _gram_by_halves(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch n n"]:
    half = x.shape[-1] // 2
    if half < LEAST_HALF:
        return _whole_gram(x)
    left, right = x[..., :half], x[..., half:]
    below = inner(right, left)
    above = jnp.concatenate([_gram_by_halves(left), transpose(below)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([below, _gram_by_halves(right)], axis=-1)], axis=-2)


def scattered(rows: int, columns: int, dtype: jnp.dtype) -> Float[Array, "rows columns"]:
    """Fixed numbers that look drawn, of mean 0 and variance 1: uniform, from a hash of each entry's place.

    Where nothing but independence from the data is wanted, this is compiled in a fraction of the time of a generator.
    """
    x = jnp.arange(1, rows * columns + 1, dtype=jnp.uint32)
    # MurmurHash3's last mixing steps (Appleby, 2011): every bit of a place changes about half of the bits.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    x = x ^ (x >> 16)
    return (3**0.5 * ((x >> 8).astype(dtype) * 2.0**-23 - 1)).reshape(rows, columns)


def unit_scale(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch 1 1"]:
    """Powers of two, times which every matrix can be squared: its largest entry then is 1 to 2, if it is not extreme.

    Multiplying by them is exact. Extreme are entries above 2⁶⁴ or below 2⁻⁶³, which are brought 63 powers nearer. 1 for
    a matrix that is zero or not finite.
    """
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0).astype(jnp.float32)
    # Read from the bits: a logarithm rounds, and near a power of two to the wrong side.
    exponent = (jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23) - 127
    shift = jnp.where((largest > 0) & jnp.isfinite(largest), -exponent, 0)
    shift = jnp.clip(shift, -_MOST_EXPONENT, _MOST_EXPONENT)
    return jax.lax.bitcast_convert_type((shift + 127) << 23, jnp.float32).astype(x.dtype)


def norm(x: Float[Array, "m n"]) -> Float[Array, ""]:
    """‖X‖, also where the squares are too large or too small for float32."""
    scale = unit_scale(x)
    return jnp.sqrt(jnp.sum((x * scale) ** 2)) / scale[0, 0]


def product_norm(left: Float[Array, "m k"], right: Float[Array, "n k"]) -> Float[Array, ""]:
    """‖L Rᵀ‖ of thin matrices, from their Gram matrices: ‖L Rᵀ‖² = ⟨LᵀL, RᵀR⟩, in place of m n products."""
    unit = unit_scale(left)  # to be squared
    # Of a product of nothing, rounding may leave less than that.
    return jnp.sqrt(jnp.maximum(jnp.sum(gram(unit * left) * gram(right)), 0)) / unit[0, 0]


def eigh_descending(
    x: Float[Array, "*batch n n"],
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n n"]]:
    """Eigenvalues and eigenvectors of symmetric matrices, the largest first."""
    # LAPACK reads one triangle: averaging it with the other would only take time and memory.
    values, vectors = jnp.linalg.eigh(x, symmetrize_input=False)
    return values[..., ::-1], vectors[..., ::-1]


def thin_svd(
    x: Float[Array, "*batch m n"],
) -> tuple[Float[Array, "*batch m r"], Float[Array, "*batch r"], Float[Array, "*batch r n"]]:
    """U, σ in falling order and Vᵀ, with r = min(m, n)."""
    # A power of two changes no digit, and keeps the squares that LAPACK forms within float32.
    scale = unit_scale(x)
    u, s, vt = jnp.linalg.svd(x * scale, full_matrices=False)
    return u, s / scale[..., 0], vt


def orthonormalize(v: Float[Array, "*batch n k"], steps: int = 3) -> Float[Array, "*batch n k"]:
    """Makes nearly orthonormal columns orthonormal (Newton-Schulz)."""
    # ‖VᵀV − I‖ becomes about 3/4 of its square: three steps take 0.1 to 1e-9.
    for _ in range(steps):
        v = 1.5 * v - 0.5 * matmul(v, gram(v))
    return v
