"""A batch a few layers at a time, and one after another: the order in which decompositions may run."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Most matrices in one LAPACK call: large batches have corrupted the heap on many cores (jax issue 39292).
LAPACK_BATCH = 64
# Most numbers of the layers that are solved by products at a time, 256 MiB in float32: all cores share a large product,
# so that more layers would take memory, several times their own, and no less time.
MOST_NUMBERS = 2**26


def after(x: Float[Array, "..."], *done: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, unchanged, but not available before all of `done` are: a dependence that no compiler pass removes.

    On CPU, LAPACK calls of XLA must never overlap (see `linalg.dispatch`), and `jax.lax.optimization_barrier` is no
    help: the CPU compiler drops it.
    """
    # Of a concatenation the last part: the compiler looks through to it alone.
    for probe in (jnp.ravel(array)[-1] for array in done if array.size):
        x = x + jnp.where(jnp.isfinite(probe), jnp.minimum(jnp.abs(probe), 0), 0).astype(x.dtype)
    return x


_as_then: list[int] = []  # how many layers at a time, where a merge of another machine is done again


@contextlib.contextmanager
def at_once(n_layers: int) -> Iterator[None]:
    """Works on so many layers at a time, whatever the cores: the bits of a merge depend on that number.

    Programs that were compiled for another number are let go of. Not for several threads.
    """
    changes = n_layers != layers_at_once()
    if changes:
        jax.clear_caches()
    _as_then.append(n_layers)
    try:
        yield
    finally:
        _as_then.pop()
        if changes:
            jax.clear_caches()


def layers_at_once() -> int:
    """How many layers a CPU works on at a time: one to each core, so that they stay in its cache."""
    if _as_then:
        return _as_then[-1]
    # Those this process may use, not all of the machine: `taskset` and batch systems give fewer.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, LAPACK_BATCH)


def layers_by_products(numbers: int) -> int:
    """As `layers_at_once`, of layers of so many numbers each on which nearly all work is products: few of large ones.

    >>> layers_by_products(4096 * 11008)
    1
    """
    return max(1, min(layers_at_once(), MOST_NUMBERS // numbers))


def chunk_size(n_layers: int, most: int) -> int:
    """How many layers `in_chunks` takes at a time: at most `most`, and so that all chunks are equal, or nearly.

    >>> [chunk_size(n, 4) for n in (3, 4, 5, 10)]
    [3, 4, 3, 4]
    """
    n_chunks = -(-n_layers // most)
    return -(-n_layers // n_chunks)


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
    size = chunk_size(n_layers, size)
    n_chunks = -(-n_layers // size)
    if n_chunks <= 1:
        return function(*arrays)
    missing = n_chunks * size - n_layers

    def split(x: Array) -> Array:
        filled = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x
        return filled.reshape(n_chunks, size, *x.shape[1:])

    def join(x: Array) -> Array:
        return x.reshape(n_chunks * size, *x.shape[2:])[:n_layers]

    chunks = jax.tree.map(split, arrays)
    if not in_place:
        return jax.tree.map(join, jax.lax.map(lambda chunk: function(*chunk), chunks))

    # The carry of a scan is one buffer for all iterations, so writing to it copies nothing.
    def overwrite(first: Any, chunk: tuple[Array, Any]) -> tuple[Any, Any]:
        i, others = chunk
        written, result = function(jax.tree.map(lambda x: x[i], first), *others)
        return jax.tree.map(lambda x, y: x.at[i].set(y), first, written), result

    return jax.tree.map(join, jax.lax.scan(overwrite, chunks[0], (jnp.arange(n_chunks), chunks[1:])))
