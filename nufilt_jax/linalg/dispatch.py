"""Runs compiled programs that call LAPACK so that, on CPU, never two of those calls are in flight.

XLA's CPU runtime executes a LAPACK call on a worker of its thread pool, and the call waits there for sub-tasks of
its own. With as many calls in flight as there are workers, nothing moves again: on a machine with two cores two
independent decompositions freeze the process. So programs run one after another here, and inside one program every
decomposition waits, by data, for the one before it.

One case is out of reach: a caller's own `jax.jit` with a solve inside a `scan`, `cond` or `while_loop` and another
outside it. These are different traces, and a value of one cannot be handed to the other.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import scipy.linalg.cython_lapack  # noqa: F401  what XLA calls on CPU, loaded before its threads are asked for
from jax.core import Tracer
from jax.extend.core import get_opaque_trace_state
from jax.interpreters.partial_eval import DynamicJaxprTracer
from threadpoolctl import ThreadpoolController

from nufilt_jax.errors import ConfigError, Problem
from nufilt_jax.linalg.chunks import after, layers_at_once

_alone = threading.RLock()
# The trace that `run_alone` was last part of, and its last result there; weak, as a tracer must not outlive its trace.
_last_traced: list[tuple[object, weakref.ref]] = []


def on_cpu(tree: Any) -> bool:
    """Whether any array of `tree` lives on a CPU device."""
    leaves = jax.tree.leaves(tree)
    return any(d.platform == "cpu" for x in leaves if isinstance(x, jax.Array) for d in x.devices())


def is_traced(tree: Any) -> bool:
    """Whether a caller's `jax.jit` is being traced, so that no array has numbers yet."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


@functools.cache
def _blas() -> ThreadpoolController:
    """The BLAS threads of this process.

    XLA spreads the matrices of one LAPACK call over the cores. With threads of its own inside each, OpenBLAS is
    slower.
    """
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
