"""What the rules share that treat every number alike: D ← keep·D + gain·τ."""

import functools

import jax
import jax.numpy as jnp

from nufilt_jax.config import OtherParams
from nufilt_jax.methods.stacked import Array, Stacked, Stacks, TaskVector


@functools.partial(jax.jit, donate_argnums=0)
def _blend(delta: Stacks, task: Stacks, keep: Array, gain: Array) -> tuple[jax.Array, ...]:
    pairs = zip(delta, task, strict=True)
    return tuple(jnp.asarray(keep) * jnp.asarray(d) + jnp.asarray(gain) * jnp.asarray(t) for d, t in pairs)


def blend(delta: Stacked, task: TaskVector, *, keep: float, gain: float) -> Stacked:
    """keep·D + gain·τ; takes the memory of D."""
    # Factors as arrays: as constants they would be a new program at every t of a running mean.
    return Stacked(_blend(delta.stacks, task.stacks, jnp.float32(keep), jnp.float32(gain)), delta.names)


def move_others(delta: Stacked, task: TaskVector, step: int, rule: OtherParams) -> Stacked:
    """D of the parameters outside the selected layers: running mean, or the first task's for ever."""
    t = step + 1
    if rule == "average":
        return blend(delta, task, keep=(t - 1) / t, gain=1 / t)
    if t == 1:
        return blend(delta, task, keep=0.0, gain=1.0)
    return delta
