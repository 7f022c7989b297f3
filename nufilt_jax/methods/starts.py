"""Where the trained corrections start: drawn for each layer, or given."""

import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from nufilt_jax.anatomy import FLAT
from nufilt_jax.core import adapt
from nufilt_jax.errors import ConfigError, Problem, raise_all
from nufilt_jax.methods.stacked import Group, Tensor


def adapter_keys(seed: int, step: int, names: tuple[str, ...]) -> UInt32[np.ndarray, "layers 2"]:
    """Raw threefry keys of the adapters' starts, from (seed, step, canonical name) alone.

    So that grouping, batching, sharding and the order of files never change a result.
    """
    # A raw threefry key is two words of 32 bits: the first 8 bytes, in one order on all machines.
    digests = [hashlib.sha256(f"{seed}\0{step}\0{name}".encode()).digest()[:8] for name in names]
    return np.frombuffer(b"".join(digests), dtype="<u4").reshape(-1, 2).astype(np.uint32)


def given_starts(starts: Mapping[str, Tensor], group: Group, rank: int) -> np.ndarray:
    """A's starts of a group's layers, `[layers, rank, width]` in float32, in the group's order.

    Args:
      starts: A0 `[rank, width]` by layer, as `nufilt_jax.draw_start` gives them.
      group: the layers.
      rank: of the correction.

    Raises:
      ConfigError: layers without a start, or with one of another shape or that is not finite, all listed.
    """
    shape, problems, found = (rank, group.width), list[Problem](), list[np.ndarray]()
    for name in (layer.removesuffix(FLAT) for layer in group.names):
        start = np.asarray(starts[name], np.float32) if name in starts else None
        if start is None:
            problems.append(Problem("adapter_start", "is missing", f"give an array {list(shape)}", name))
        elif start.shape != shape:
            problems.append(
                Problem("adapter_start", f"must have shape {list(shape)}, got {list(start.shape)}", "", name)
            )
        elif not np.isfinite(start).all():
            problems.append(Problem("adapter_start", "has NaN or infinite numbers", "", name))
        else:
            found.append(start)
    raise_all(ConfigError, problems)
    return np.stack(found)


def draw_start(seed: int, step: int, name: str, rank: int, width: int) -> jax.Array:
    """A's start of one layer as `update` draws it: from these five alone, N(0, 0.02²).

    Args:
      seed: of the rule.
      step: number of the task, counted from 1; the first needs no start.
      name: canonical name of the layer.
      rank: r_l.
      width: n, the layer's inputs.

    Returns:
      A0 `[rank, width]`, float32: what `update(..., adapter_start={name: A0})` and `solve_layer` take.

    >>> draw_start(0, 2, "model.layers.0.mlp.up_proj.weight", 4, 16).shape
    (4, 16)
    """
    return adapt.normal_start(jnp.asarray(adapter_keys(seed, step, (name,))[0]), rank, width)
