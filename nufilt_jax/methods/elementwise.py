"""What the rules share that treat every number alike: D ← keep·D + gain·τ."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from nufilt_jax.config import OtherParams
from nufilt_jax.linalg.dispatch import in_chunks, layers_at_once, run_alone
from nufilt_jax.linalg.factored import Factored, Matrix, dense, plus, with_rows
from nufilt_jax.linalg.programs import Program
from nufilt_jax.methods.stacked import Stacked, TaskVector, Tensor, TensorStacks


@functools.partial(jax.jit, donate_argnums=0)
def _blend(delta: TensorStacks, task: TensorStacks, keep: Tensor, gain: Tensor) -> tuple[jax.Array, ...]:
    pairs = zip(delta, task, strict=True)
    return tuple(jnp.asarray(keep) * jnp.asarray(d) + jnp.asarray(gain) * _array(t) for d, t in pairs)


def _array(stack: Any) -> jax.Array:
    return jnp.asarray(dense(stack) if isinstance(stack, Factored) else stack)


def blend(delta: Stacked, task: TaskVector, *, keep: float, gain: float) -> Stacked:
    """keep·D + gain·τ; takes the memory of D."""
    # Factors as arrays: as constants they would be a new program at every t of a running mean.
    factors = jnp.float32(keep), jnp.float32(gain)
    pairs = dict(enumerate(zip(delta.stacks, task.stacks, strict=True)))
    thin = [i for i, (d, _) in pairs.items() if isinstance(d, Factored)]
    whole = [i for i in pairs if i not in thin]
    moved = _blend(tuple(pairs[i][0] for i in whole), tuple(pairs[i][1] for i in whole), *factors)
    found = dict(zip(whole, moved, strict=True)) | {i: run_alone(_blend_factored, *pairs[i], *factors) for i in thin}
    return Stacked(tuple(found[i] for i in pairs), delta.names)


@functools.partial(Program, donate_argnums=0)
def _blend_factored(delta: Factored, task: Factored, keep: Tensor, gain: Tensor) -> Any:
    """The same in factors: the basis of τ is taken up into that of D."""

    def layer(d: Factored, t: Factored) -> Matrix:
        return plus(with_rows(d, jnp.asarray(keep) * d.rows), with_rows(t, jnp.asarray(gain) * t.rows), t)

    def chunk(d: Factored, t: Factored) -> tuple[Matrix, tuple]:
        return jax.vmap(layer)(d, t), ()

    return in_chunks(chunk, (delta, task), layers_at_once(), in_place=True)[0]


def move_others(delta: Stacked, task: TaskVector, step: int, rule: OtherParams) -> Stacked:
    """D of the parameters outside the selected layers: running mean, or the first task's for ever."""
    t = step + 1
    if rule == "average":
        return blend(delta, task, keep=(t - 1) / t, gain=1 / t)
    if t == 1:
        return blend(delta, task, keep=0.0, gain=1.0)
    return delta
