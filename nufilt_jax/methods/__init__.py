"""Every merging rule as a pair of pure functions, in one registry."""

from typing import get_args

import numpy as np

from nufilt_jax.config import MethodConfig, OtherParams, problem
from nufilt_jax.errors import ConfigError, Problem
from nufilt_jax.methods import nufilt, null_space, sum, task_arithmetic, weight_average
from nufilt_jax.methods.elementwise import move_others
from nufilt_jax.methods.selection import select
from nufilt_jax.methods.state import Array, Context, Merger, MergeState, OnStack, Params, Rule, check_task

RULES = {module.RULE.name: module.RULE for module in (nufilt, null_space, sum, weight_average, task_arithmetic)}


def find(name: str) -> Rule:
    """The rule called `name`.

    Raises:
      ConfigError: there is none.
    """
    if name not in RULES:
        raise ConfigError(problem("method", f"unknown method {name!r}", f"choose from {', '.join(RULES)}"))
    return RULES[name]


def get(
    name: str,
    config: MethodConfig | None = None,
    *,
    seed: int = 0,
    layers: str | None = None,
    other_params: OtherParams = "pretrained",
) -> Merger:
    """A merging rule, ready to use.

    Args:
      name: one of `RULES`.
      config: its settings; None for the defaults.
      seed: of the adapter's start.
      layers: regular expression searched in the names of matrices; None for the published choice.
      other_params: what becomes of the parameters outside the selected layers: they stay `pretrained`, stay as the
        `first` task has them, or are the running `average` of the tasks'.

    Raises:
      ConfigError: an unknown rule, or settings of another rule.

    >>> import numpy as np, nufilt_jax as nj
    >>> base = {"model.layers.0.self_attn.q_proj.weight": np.zeros((4, 4), np.float32)}
    >>> rule = nj.methods.get("sum")
    >>> state = rule.update(rule.init(base), {name: x + 1 for name, x in base.items()})
    >>> float(state.merged["model.layers.0.self_attn.q_proj.weight"].sum())
    16.0
    """
    rule = find(name)
    config = rule.config() if config is None else config
    if type(config) is not rule.config:
        wanted, got = rule.config.__name__, type(config).__name__
        raise ConfigError(Problem("config", f"{name} takes a {wanted}, got a {got}"))
    if other_params not in get_args(OtherParams):
        what = f"must be one of {', '.join(get_args(OtherParams))}, got {other_params!r}"
        raise ConfigError(problem("other_params", what))

    def init(base: Params) -> MergeState:
        selection = select(base, layers=layers, other_params=other_params, every_tensor=rule.every_tensor)
        delta: dict[str, Array] = {name: np.zeros(base[name].shape, np.float32) for name in selection.touched}
        return MergeState(dict(base), delta)

    def update(state: MergeState, task: Params, on_stack: OnStack | None = None) -> MergeState:
        chosen = select(state.base, layers=layers, other_params=other_params, every_tensor=rule.every_tensor)
        check_task(state.base, task, state.delta)
        done = rule.advance(state, task, Context(chosen.layers, config, seed, on_stack))
        others = move_others(state, task, chosen.other, other_params)
        return MergeState(state.base, {**done.delta, **others}, state.step + 1, dict(done.extra), dict(done.report))

    return Merger(init, update)
