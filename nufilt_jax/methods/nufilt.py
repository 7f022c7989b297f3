"""NUFILT: filter, adapt, fuse (Qiu et al., arXiv:2509.21413v2), one program per input width."""

import functools
import hashlib
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from nufilt_jax.config import NufiltConfig
from nufilt_jax.core.adapt import draw_start
from nufilt_jax.core.dispatch import run_alone
from nufilt_jax.core.filter import authors_first_filter
from nufilt_jax.core.solve import GroupSolution, solve_group
from nufilt_jax.core.stacks import Group, group_layers, stack, unstack
from nufilt_jax.core.subspace import Stacks
from nufilt_jax.errors import Problem, SolveError, raise_all
from nufilt_jax.methods.elementwise import blend
from nufilt_jax.methods.state import Advance, Array, Context, LayerReport, MergeState, Params, Rule


def advance(state: MergeState, task: Params, context: Context) -> Advance:
    """θ^m_1 = θ_1; then θ^m_t = θ^m_{t−1} + τ (P + BA) (Algorithm 1)."""
    config = cast(NufiltConfig, context.config)
    if state.step == 0:
        delta = blend(state, task, context.names, keep=0.0, gain=1.0)
        if config.first_task == "authors":
            delta = {name: authors_first_filter(jnp.asarray(x), config.filter_rank) for name, x in delta.items()}
        return Advance(delta)
    delta: dict[str, Array] = {}
    report: dict[str, LayerReport] = {}
    for group in group_layers({name: state.base[name].shape for name in context.names}):
        part = _advance_group(group, state, task, context, config)
        delta |= part.delta
        report |= part.report
    broken = [
        Problem("task", "the solution is not finite", "lower --learning-rate", n) for n in delta if n not in report
    ]
    raise_all(SolveError, broken)
    return Advance(delta, report)


def _advance_group(group: Group, state: MergeState, task: Params, context: Context, config: NufiltConfig) -> Advance:
    keys = adapter_keys(context.seed, state.step + 1, group.names)
    stacks = [tuple(stack(p, names) for names in group.stacks) for p in (state.delta, state.base, task)]
    deltas, solution = run_alone(functools.partial(_step, config=config), *stacks, keys)
    losses = np.asarray(solution.losses) if config.adapter_rank else np.zeros((len(group.names), 0), np.float32)
    whole = LayerReport(losses, *(np.asarray(x) for x in solution.forecast))
    if context.on_stack is not None:
        context.on_stack(f"{len(group.names)} layers of width {group.width}", whole)
    ok = np.asarray(solution.ok)
    rows = {name: jax.tree.map(lambda x, i=i: x[i], whole) for i, name in enumerate(group.names) if ok[i]}
    parts = [unstack(d, names) for d, names in zip(deltas, group.stacks, strict=True)]
    return Advance({name: x for part in parts for name, x in part.items()}, rows)


@functools.partial(jax.jit, static_argnames="config", donate_argnums=0)
def _step(
    deltas: Stacks,
    base: tuple[Array, ...],
    task: tuple[Array, ...],
    keys: UInt32[Array, "layers 2"],
    *,
    config: NufiltConfig,
) -> tuple[Stacks, GroupSolution]:
    """D + τ (P + BA) for the layers of one width, from the tensors as the files hold them."""
    pairs = zip(task, base, strict=True)
    task_deltas = tuple(jnp.asarray(t, jnp.float32) - jnp.asarray(b, jnp.float32) for t, b in pairs)
    width = deltas[0].shape[-1]
    start = jax.vmap(lambda key: draw_start(key, config.adapter_rank, width))(keys)
    solution = solve_group(deltas, task_deltas, start, config=config)
    merged = tuple(d + update for d, update in zip(deltas, solution.updates, strict=True))
    return merged, solution._replace(updates=())


def adapter_keys(seed: int, step: int, names: tuple[str, ...]) -> UInt32[np.ndarray, "layers 2"]:
    """Raw threefry keys of the adapters' starts, from (seed, step, canonical name) alone.

    So that grouping, batching, sharding and the order of files never change a result.
    """
    digests = [hashlib.sha256(f"{seed}\0{step}\0{name}".encode()).digest()[:8] for name in names]
    return np.frombuffer(b"".join(digests), dtype="<u4").reshape(-1, 2).astype(np.uint32)


RULE = Rule("nufilt", NufiltConfig, advance)
