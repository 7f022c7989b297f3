"""Dense products of whole batches, and the order in which decompositions may run.

Everything here takes leading batch axes; a batch is one operation.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Most matrices in one LAPACK call: large batches have corrupted the heap on many cores (jax issue 39292).
LAPACK_BATCH = 64
# Most that the squares of what `unit_scale` scales by may be, and the inverse of the least: normal float32 numbers.
_MOST_EXPONENT = 63
# Half the width of a matrix from which on symmetry saves more than two more products cost.
LEAST_HALF = 192


def matmul(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """Matrix product in full float32: accelerators would otherwise round to TF32 or bfloat16."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def transpose(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch n m"]:
    """The last two axes exchanged."""
    return jnp.swapaxes(x, -1, -2)


def gram(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch n n"]:
    """XᵀX; of wide matrices the half above the diagonal is copied from below."""
    half = x.shape[-1] // 2
    if half < LEAST_HALF:
        return matmul(transpose(x), x)
    left, right = x[..., :half], x[..., half:]
    below = matmul(transpose(right), left)
    above = jnp.concatenate([gram(left), transpose(below)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([below, gram(right)], axis=-1)], axis=-2)


def unit_scale(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch 1 1"]:
    """Powers of two, times which every matrix can be squared: its largest entry then is 1 to 2, if it is not extreme.

    Multiplying by them is exact. Extreme are entries above 2⁶⁴ or below 2⁻⁶³, which are brought 63 powers nearer. 1 for
    a matrix that is zero or not finite.
    """
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0).astype(jnp.float32)
    exponent = (jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23) - 127
    shift = jnp.where((largest > 0) & jnp.isfinite(largest), -exponent, 0)
    shift = jnp.clip(shift, -_MOST_EXPONENT, _MOST_EXPONENT)
    return jax.lax.bitcast_convert_type((shift + 127) << 23, jnp.float32).astype(x.dtype)


def norm(x: Float[Array, "m n"]) -> Float[Array, ""]:
    """‖X‖, also where the squares are too large or too small for float32."""
    scale = unit_scale(x)
    return jnp.sqrt(jnp.sum((x * scale) ** 2)) / scale[0, 0]


def eigh_descending(
    x: Float[Array, "*batch n n"],
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n n"]]:
    """Eigenvalues and eigenvectors of symmetric matrices, the largest first."""
    values, vectors = jnp.linalg.eigh(x, symmetrize_input=False)
    return values[..., ::-1], vectors[..., ::-1]


def thin_svd(
    x: Float[Array, "*batch m n"],
) -> tuple[Float[Array, "*batch m r"], Float[Array, "*batch r"], Float[Array, "*batch r n"]]:
    """U, σ in falling order and Vᵀ, with r = min(m, n)."""
    scale = unit_scale(x)
    u, s, vt = jnp.linalg.svd(x * scale, full_matrices=False)
    return u, s / scale[..., 0], vt


def orthonormalize(v: Float[Array, "*batch n k"], steps: int = 3) -> Float[Array, "*batch n k"]:
    """Makes nearly orthonormal columns orthonormal (Newton-Schulz)."""
    for _ in range(steps):
        v = 1.5 * v - 0.5 * matmul(v, gram(v))
    return v


def after(x: Float[Array, "..."], *done: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, unchanged, but not available before all of `done` are: a dependence that no compiler pass removes.

    On CPU, LAPACK calls of XLA must never overlap (see `core.dispatch`), and `jax.lax.optimization_barrier` is no
    help: the CPU compiler drops it.
    """
    # Of a concatenation the last part: the compiler looks through to it alone.
    for probe in (jnp.ravel(array)[-1] for array in done if array.size):
        x = x + jnp.where(jnp.isfinite(probe), jnp.minimum(jnp.abs(probe), 0), 0).astype(x.dtype)
    return x


def layers_at_once() -> int:
    """How many layers a CPU works on at a time: one to each core, so that they stay in its cache."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, LAPACK_BATCH)


def in_chunks(function: Callable[..., Any], arrays: Any, size: int, *, in_place: bool = False) -> Any:
    """`function(*arrays)` on at most `size` layers at a time, one chunk after another.

    The LAPACK calls of one chunk never overlap those of another.

    Args:
      function: of arrays with a leading layer axis; its results have one too, and each row of them depends on the
        same row of the arrays alone.
      arrays: a tuple of pytrees of such arrays.
      size: chunks are made equal, the last one filled up with copies of the last layer.
      in_place: `function` returns a pair, the first of it to be written where the first array, of the same shape, was.
    """
    n_layers = len(jax.tree.leaves(arrays)[0])
    n_chunks = -(-n_layers // size)
    if n_chunks <= 1:
        return function(*arrays)
    size = -(-n_layers // n_chunks)
    missing = n_chunks * size - n_layers

    def split(x: Array) -> Array:
        filled = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x
        return filled.reshape(n_chunks, size, *x.shape[1:])

    def join(x: Array) -> Array:
        return x.reshape(n_chunks * size, *x.shape[2:])[:n_layers]

    chunks = jax.tree.map(split, arrays)
    if not in_place:
        return jax.tree.map(join, jax.lax.map(lambda chunk: function(*chunk), chunks))

    def overwrite(first: Array, chunk: tuple[Array, Any]) -> tuple[Array, Any]:
        i, others = chunk
        written, result = function(first[i], *others)
        return first.at[i].set(written), result

    return jax.tree.map(join, jax.lax.scan(overwrite, chunks[0], (jnp.arange(n_chunks), chunks[1:])))
