"""A merge gone on with from a merged model alone, whoever merged it."""

from collections.abc import Mapping

from nufilt_jax.errors import CheckpointError, ConfigError, Problem, raise_all
from nufilt_jax.methods.merger import Merger
from nufilt_jax.methods.stacked import TaskVector, Tensor, task_vector
from nufilt_jax.methods.state import MergeState, check_task, nonfinite
from nufilt_jax.values import whole_number


def continue_from(
    base: Mapping[str, Tensor], merged: Mapping[str, Tensor], rule: Merger | None = None, *, step: int = 1
) -> MergeState:
    """The state after `step` tasks, of which only the merged model is left: D = θ^m − θ0.

    What the model's own type has rounded away is lost; the output folder's `state/` keeps D in float32.

    Args:
      base: θ0 by canonical name, as `nufilt_jax.load` gives it.
      merged: θ^m by canonical name; tensors that the rule does not touch may be missing.
      rule: that goes on, from `methods.get`; None for NUFILT with its defaults.
      step: number of tasks merged so far; a running mean weighs by it, and an adapter's start is drawn by it.

    Raises:
      ConfigError: the rule remembers more than the merged model, or `step` is no whole number from 1.
      CheckpointError: tensors that are missing, of another shape or not finite, all listed.

    >>> import numpy as np
    >>> base = {"model.layers.0.self_attn.q_proj.weight": np.zeros((4, 4), np.float32)}
    >>> state = continue_from(base, {name: x + 1 for name, x in base.items()}, step=3)
    >>> state.step, float(state.merged["model.layers.0.self_attn.q_proj.weight"].sum())
    (3, 16.0)
    """
    if rule is None:
        from nufilt_jax.methods import get

        rule = get("nufilt")
    n_merged = whole_number(step)
    if n_merged is None:
        raise ConfigError(Problem("step", f"must be a whole number, got {step!r}"))
    if n_merged < 1:
        raise ConfigError(Problem("step", f"must be at least 1, got {step}", "begin with rule.init(base)"))
    if rule.remembers:
        what = f"{rule.name} remembers more of a merge than the merged model"
        raise ConfigError(Problem("rule", what, "continue it from its state, or from its output folder with --add"))
    state = rule.init(base)
    check_task(state.base, merged, state.touched)
    raise_all(CheckpointError, nonfinite(merged, state.touched, "merged"))
    found: TaskVector = task_vector(base, merged, state.delta.names)
    return MergeState(state.base, type(state.delta)(found.stacks, found.names), n_merged)
