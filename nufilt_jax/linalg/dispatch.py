"""How programs run: compiled once for all, never two with LAPACK calls at the same time, a batch chunk by chunk.

XLA's CPU runtime executes a LAPACK call on a worker of its thread pool, and the call waits there for sub-tasks of
its own. With as many calls in flight as there are workers, nothing moves again: on a machine with two cores two
independent decompositions freeze the process. So programs run one after another here, and inside one program every
decomposition waits, by data, for the one before it.

One case is out of reach: a caller's own `jax.jit` with a solve inside a `scan`, `cond` or `while_loop` and another
outside it. These are different traces, and a value of one cannot be handed to the other.
"""

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import get_opaque_trace_state
from jax.interpreters.partial_eval import DynamicJaxprTracer
from jaxtyping import Array, Float
from threadpoolctl import ThreadpoolController

from nufilt_jax.errors import ConfigError, Problem
from nufilt_jax.linalg.programs import platforms_of

# Most matrices in one LAPACK call: large batches have corrupted the heap on many cores (jax issue 39292).
LAPACK_BATCH = 64
# Most numbers of the layers that are solved by products at a time, 256 MiB in float32: all cores share a large product,
# so that more layers would take memory, several times their own, and no less time.
MOST_NUMBERS = 2**26

_alone = threading.RLock()
# The trace that `run_alone` was last part of, and its last result there; weak, as a tracer must not outlive its trace.
_last_traced: list[tuple[object, weakref.ref]] = []
_as_then: list[int] = []  # how many layers at a time, where a merge of another machine is done again


def on_cpu(tree: Any) -> bool:
    """Whether any array of `tree` lives on a CPU device."""
    return "cpu" in platforms_of(tree)


@functools.cache
def _blas() -> ThreadpoolController:
    """The BLAS threads of this process.

    XLA spreads the matrices of one LAPACK call over the cores. With threads of its own inside each, OpenBLAS is
    slower.
    """
    # What XLA calls on CPU, loaded before its threads are asked for, and not by those who only read of a method.
    import scipy.linalg.cython_lapack  # noqa: F401

    return ThreadpoolController()


def run_alone(program: Callable[..., Any], *arrays: Any) -> Any:
    """Calls `program(*arrays)`, on CPU only once everything dispatched through here is done.

    Under a caller's `jax.jit` the program becomes part of the caller's; it is then made to wait for the last one
    traced into it. On other platforms nothing blocks.

    Args:
      program: a compiled function of pytrees of arrays.
      *arrays: its arguments; the first leaf of the first one must be a floating array.

    Returns:
      What `program` returns; ready, on CPU.
    """
    tracers = [x for x in jax.tree.leaves(arrays) if isinstance(x, Tracer)]
    if tracers:
        return _inline(program, tracers, arrays)
    if not on_cpu(arrays):
        return program(*arrays)
    with _alone, _blas().limit(limits=1, user_api="blas"):
        # Arguments may still be on their way, out of a LAPACK call of somebody else's program.
        jax.block_until_ready(arrays)
        return jax.block_until_ready(program(*arrays))


def each_on_host(function: Callable[..., Any], *stacks: np.ndarray) -> Iterator[Any]:
    """`function` of each layer of host arrays, in their order.

    A layer to each core, with one BLAS thread: decompositions by all cores, one after another, take several times
    longer.
    """
    with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(layers_at_once()) as pool:
        yield from pool.map(function, *stacks)


def _inline(program: Callable[..., Any], tracers: list[Tracer], arrays: tuple) -> Any:
    # `vmap` and `grad` hand over tracers of their own, inside which no order of LAPACK calls can be kept.
    if not all(isinstance(x, DynamicJaxprTracer) for x in tracers):
        raise ConfigError(Problem("solve", "cannot be transformed by vmap or grad", "solve_stack is the batched form"))
    state = get_opaque_trace_state()
    leaves, structure = jax.tree.flatten(arrays)
    if _last_traced and _last_traced[0][0] == state and (done := _last_traced[0][1]()) is not None:
        leaves[0] = after(leaves[0], done)
    result = program(*jax.tree.unflatten(structure, leaves))
    _last_traced[:] = [(state, weakref.ref(jax.tree.leaves(result)[0]))]
    return result


def after(x: Float[Array, "..."], *done: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, unchanged, but not available before all of `done` are: a dependence that no compiler pass removes.

    On CPU, LAPACK calls of XLA must never overlap (see above), and `jax.lax.optimization_barrier` is no
    help: the CPU compiler drops it.
    """
    # Of a concatenation the last part: the compiler looks through to it alone.
    for probe in (jnp.ravel(array)[-1] for array in done if array.size):
        x = x + jnp.where(jnp.isfinite(probe), jnp.minimum(jnp.abs(probe), 0), 0).astype(x.dtype)
    return x


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
