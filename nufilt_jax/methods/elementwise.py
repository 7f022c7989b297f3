"""What the rules share that treat every number alike: D ← keep·D + gain·τ."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from nufilt_jax.config import OtherParams
from nufilt_jax.methods.state import Array, MergeState, Params


@jax.jit
def _blend(delta: Array, base: Array, task: Array, keep: Array, gain: Array) -> jax.Array:
    delta, keep, gain = (jnp.asarray(x) for x in (delta, keep, gain))
    return keep * delta + gain * (jnp.asarray(task, jnp.float32) - jnp.asarray(base, jnp.float32))


def blend(state: MergeState, task: Params, names: Iterable[str], *, keep: float, gain: float) -> dict[str, Array]:
    """keep·D + gain·τ for the named tensors, in float32."""
    weights = jnp.float32(keep), jnp.float32(gain)
    return {name: _blend(state.delta[name], state.base[name], task[name], *weights) for name in names}


def move_others(state: MergeState, task: Params, names: Iterable[str], rule: OtherParams) -> dict[str, Array]:
    """D of the parameters outside the selected layers: running mean, or the first task's for ever."""
    t = state.step + 1
    if rule == "average":
        return blend(state, task, names, keep=(t - 1) / t, gain=1 / t)
    if t == 1:
        return blend(state, task, names, keep=0.0, gain=1.0)
    return {name: state.delta[name] for name in names}
