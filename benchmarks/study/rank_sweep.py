"""A stream of tasks merged by NUFILT with many settings of its ranks at once (Fig. 4, arXiv:2509.21413v2)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.study.rank_solve import solve_settings
from nufilt_jax.anatomy import shape_in
from nufilt_jax.config import problem
from nufilt_jax.core.adapt import normal_start
from nufilt_jax.errors import ConfigError
from nufilt_jax.methods.matrices import require_finite
from nufilt_jax.methods.nufilt import NufiltConfig
from nufilt_jax.methods.selection import select
from nufilt_jax.methods.stacked import Params, Stacked, Tensor, stack_names, task_vector
from nufilt_jax.methods.starts import adapter_keys
from nufilt_jax.methods.state import MergeState

_WIDTH = 768  # of the tower that the paper's ranks are for


class Ranks(NamedTuple):
    """One setting: r_p, r_l and r_v."""

    filter_rank: int
    adapter_rank: int
    task_rank: int


def figure_4(width: int) -> dict[str, tuple[Ranks, ...]]:
    """The settings of Fig. 4 for layers of `width` inputs: the paper's for 768, else in the same proportion.

    Returns:
      Settings by the field of `Ranks` that is varied: r_p with r_l = r_v = 0; r_l with r_p = 128 and r_v = 8; r_v with
      r_p = 128 and r_l = 16. Settings that come out alike stand once.

    >>> [setting.filter_rank for setting in figure_4(128)["filter_rank"]]
    [0, 3, 5, 11, 21, 43, 85]
    """

    def scaled(rank: int) -> int:
        return min(width, max(1, round(rank * width / _WIDTH))) if rank else 0

    filtered, few, adapter = scaled(128), scaled(8), scaled(16)
    ranks = {most: [scaled(rank) for rank in _doubling(most)] for most in (128, 256, 512)}
    return {
        "filter_rank": tuple(dict.fromkeys(Ranks(rank, 0, 0) for rank in ranks[512])),
        "adapter_rank": tuple(dict.fromkeys(Ranks(filtered, rank, few) for rank in ranks[256])),
        "task_rank": tuple(dict.fromkeys(Ranks(filtered, adapter, rank) for rank in ranks[128])),
    }


def _doubling(most: int) -> list[int]:
    """0 and six ranks up to `most`, each twice the one before."""
    return [0, *(most >> i for i in range(5, -1, -1))]


def merge_settings(
    base: Params,
    tasks: Iterable[Params],
    ranks: Sequence[Ranks],
    *,
    seed: int = 0,
    config: NufiltConfig | None = None,
) -> Iterator[tuple[dict[str, Tensor], ...]]:
    """Merges a stream with every setting; gives the merged models of all settings after every task.

    The same as `methods.get("nufilt", ...)` setting by setting, but compiled once and solved as one program per stack.
    All models are in memory at once: one D for every setting.

    Args:
      base: θ0 by canonical name.
      tasks: θ_t, in order.
      ranks: the settings.
      seed: of the adapters' start.
      config: Adam's steps and learning rate, None for the defaults; the rest of it is not used.

    Raises:
      ConfigError: another solver than Adam.
      SolveError: layers of which a result is not finite, all listed.
    """
    if config is not None and config.solver != "adam":
        raise ConfigError(problem("solver", f"ranks are swept for adam alone, got {config.solver}"))
    largest = Ranks(*(max(column) for column in zip(*ranks, strict=True)))
    adam = config or NufiltConfig()
    config = NufiltConfig(**largest._asdict(), steps=adam.steps, learning_rate=adam.learning_rate, decomposition="svd")
    layers = select(base).layers
    names = stack_names({name: shape_in(base, name) for name in layers}, layers)
    table = jnp.array(ranks, jnp.int32)
    merged: list[jax.Array] = []
    for step, task in enumerate(tasks, 1):
        vectors = task_vector(base, task, names).stacks
        if step == 1:  # θ^m_1 = θ_1
            merged = [jnp.asarray(vector)[None] for vector in vectors]
        else:
            for i, members in enumerate(names):
                start = _starts(seed, step, members, largest.adapter_rank, vectors[i].shape[-1])
                merged[i] = merged[i] + solve_settings(merged[i], jnp.asarray(vectors[i]), start, table, config=config)
        yield tuple(_model(base, merged, names, setting) for setting in range(len(ranks)))


def _starts(seed: int, step: int, names: tuple[str, ...], rank: int, width: int) -> jax.Array:
    """A's start at the largest rank: the draw of a lower one is its first rows."""
    keys = jnp.asarray(adapter_keys(seed, step, names))
    return jax.vmap(lambda key: normal_start(key, rank, width))(keys)


def _model(
    base: Params, merged: Sequence[jax.Array], names: tuple[tuple[str, ...], ...], setting: int
) -> dict[str, Tensor]:
    delta = Stacked(tuple(np.asarray(x[min(setting, len(x) - 1)]) for x in merged), names)
    require_finite(delta)
    return MergeState(dict(base), delta).merged
