"""One NUFILT step for arrays: the door for those who have matrices and no merge."""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nufilt_jax.core.settings import SolveConfig
from nufilt_jax.core.solve import mended, solve_group
from nufilt_jax.errors import ConfigError, Problem, raise_all
from nufilt_jax.linalg.dispatch import run_alone
from nufilt_jax.linalg.factored import rows_of
from nufilt_jax.linalg.programs import Program, is_traced


class LayerSolution(NamedTuple):
    """What a solve returns; with a leading layer axis from `solve_stack`.

    Attributes:
      update: τ (P + BA), or τ P + E in closed form, to be added to the merged weights. float32.
      losses: the data-free loss before each Adam step and after the last; before and after the closed form. Infinite
        where float32 cannot hold it, as for weights of 1e19.
      ok: whether all that was computed is finite.
    """

    update: Float[Array, "*layers m n"]
    losses: Float[Array, "*layers n_losses"]
    ok: Bool[Array, "*layers"]


_solve_group = Program(solve_group, static_argnames=("add", "until_certified"))


def solve_stack(
    merged_delta: Float[Array, "layers m n"],
    task_delta: Float[Array, "layers m n"],
    *,
    config: SolveConfig,
    adapter_init: Float[Array, "layers r_l n"],
    largest: SolveConfig | None = None,
) -> LayerSolution:
    """One NUFILT step for a stack of same-shaped layers, as one compiled program.

    Source: Qiu et al., arXiv:2509.21413v2, Eqs. (7)-(10) and (15)-(17).

    Args:
      merged_delta: D = θ^m_{t−1} − θ0 of each layer. Any floating dtype; computed in float32.
      task_delta: τ = θ_t − θ0 of each layer.
      config: ranks, steps and learning rate; one compilation for all learning rates, ridges and, in steps of 64, steps.
      adapter_init: A's start, r_l = `config.adapter_rank` rows; [layers, 0, n] for rank 0 or the closed form.
      largest: settings whose ranks to compile for, none below those of `config`, which then are data: one compilation
        for a sweep over ranks, of which each takes the time of the largest. None compiles for `config` alone.

    Returns:
      The update per layer, with θ^m_t = θ^m_{t−1} + update; its losses; and whether all of it is finite.

    Raises:
      ConfigError: shapes or dtypes that do not fit each other or `config`.

    >>> import jax, nufilt_jax as nj
    >>> d, t = jax.random.normal(jax.random.key(0), (2, 3, 16, 8))
    >>> config = nj.NufiltConfig(filter_rank=2, adapter_rank=4, task_rank=2)
    >>> many = nj.solve_stack(d, t, config=config, adapter_init=jax.numpy.full((3, 4, 8), 0.02))
    >>> many.update.shape, many.losses.shape, bool(many.ok.all())
    ((3, 16, 8), (3, 51), True)
    """
    _check(merged_delta, task_delta, adapter_init, (config, largest), ("layers", "m", "n"))
    merged, task, start = (jnp.asarray(x, jnp.float32) for x in (merged_delta, task_delta, adapter_init))
    program = functools.partial(_solve_group, config=config)
    if largest is not None:
        compiled = _grown(config, largest)
        start = jnp.pad(start, ((0, 0), (0, compiled.trained_rank - start.shape[1]), (0, 0)))
        ranks = jnp.asarray([config.filter_rank, config.task_rank])
        program = functools.partial(_solve_group, config=compiled, ranks=ranks)
    if is_traced((merged, task, start)):  # nothing can be looked at before the caller's own program runs
        found = run_alone(program, (merged,), (task,), start)
    else:
        found = run_alone(functools.partial(program, until_certified=False), (merged,), (task,), start)
        found = mended(found, (merged,), (task,), start, program)
    return LayerSolution(rows_of(found.updates[0]), found.losses[:, : config.n_losses], found.ok)


def solve_layer(
    merged_delta: Float[Array, "m n"],
    task_delta: Float[Array, "m n"],
    *,
    config: SolveConfig,
    adapter_init: Float[Array, "r_l n"],
    largest: SolveConfig | None = None,
) -> LayerSolution:
    """One NUFILT step for one layer: `solve_stack` of a stack of one.

    Source: Qiu et al., arXiv:2509.21413v2, Eqs. (7)-(10) and (15)-(17).

    Args:
      merged_delta: D = θ^m_{t−1} − θ0, [outputs, inputs].
      task_delta: τ = θ_t − θ0.
      config: ranks, steps and learning rate.
      adapter_init: A's start.
      largest: as of `solve_stack`.

    Returns:
      The update, its losses and whether both are finite.

    Raises:
      ConfigError: shapes or dtypes that do not fit each other or `config`.

    >>> import jax, nufilt_jax as nj
    >>> d, t = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> config = nj.NufiltConfig(filter_rank=2, adapter_rank=0)
    >>> one = nj.solve_layer(d, t, config=config, adapter_init=jax.numpy.zeros((0, 8)))
    >>> one.update.shape
    (16, 8)
    """
    _check(merged_delta, task_delta, adapter_init, (config, largest), ("m", "n"))
    stacked = [jnp.asarray(x, jnp.float32)[None] for x in (merged_delta, task_delta, adapter_init)]
    found = solve_stack(stacked[0], stacked[1], config=config, adapter_init=stacked[2], largest=largest)
    return LayerSolution(*(x[0] for x in found))


def _grown(config: SolveConfig, largest: SolveConfig) -> SolveConfig:
    """The same settings with the ranks of others, which have to be as large."""
    ranks = {name: getattr(largest, name) for name in ("filter_rank", "adapter_rank", "task_rank")}
    raise_all(
        ConfigError,
        (
            Problem("largest", f"has {name} {most}, which is below the {least} of config")
            for name, most in ranks.items()
            if most < (least := getattr(config, name))
        ),
    )
    return dataclasses.replace(config, **ranks)


def _check(merged: Array, task: Array, start: Array, configs: tuple[object, object], axes: tuple[str, ...]) -> None:
    config, largest = configs
    settings = {"config": config} if largest is None else {"config": config, "largest": largest}
    problems = [
        Problem(name, f"must be the settings of a solve, as NufiltConfig, got {type(value).__name__}")
        for name, value in settings.items()
        if not isinstance(value, SolveConfig)
    ]
    arrays = {"merged_delta": merged, "task_delta": task, "adapter_init": start}
    problems += [
        Problem(name, f"must be a floating array, got {x.dtype}")
        for name, x in arrays.items()
        if not jnp.issubdtype(x.dtype, jnp.floating)
    ]
    if merged.ndim != len(axes) or 0 in merged.shape:
        problems.append(Problem("merged_delta", f"must be a non-empty [{', '.join(axes)}], got shape {merged.shape}"))
    elif task.shape != merged.shape:
        problems.append(Problem("task_delta", f"is {task.shape}, merged_delta is {merged.shape}"))
    elif isinstance(config, SolveConfig):
        wanted = (*merged.shape[:-2], config.trained_rank, merged.shape[-1])
        if start.shape != wanted:
            problems.append(Problem("adapter_init", f"must be {wanted} for this config, got {start.shape}"))
    raise_all(ConfigError, problems)
