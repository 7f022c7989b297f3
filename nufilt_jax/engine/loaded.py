"""A merge of weights that are in memory, one task after another."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nufilt_jax import methods
from nufilt_jax.errors import CheckpointError, NufiltError, gathering, raise_all
from nufilt_jax.methods.state import check_task, nonfinite
from nufilt_jax.output.recipe import Settings


def merged_one_by_one(
    base: Mapping[str, Any],
    tasks: Mapping[str, Mapping[str, Any]],
    settings: Settings,
    *,
    warn: Callable[[str], None] | None = None,
) -> dict[str, np.ndarray]:
    """The merged model, from weights by canonical name.

    Args:
      base: the backbone's.
      tasks: by name, in order.
      settings: how.
      warn: told of what may be accepted; None for weights that were looked at before.

    Raises:
      NufiltError: weights that cannot be merged.
    """
    how = {name: getattr(settings, name) for name in ("seed", "layers", "conv", "other_params")}
    rule = methods.get(settings.method, settings.config, **how)
    state = rule.init(base)
    if warn is not None:
        _inspect(base, tasks, state.touched, warn)
    for name, task in tasks.items():
        with _naming(name):
            state = rule.update(state, task, donate=True)
    return {name: np.asarray(value) for name, value in state.merged.items()}


def _inspect(
    base: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]], touched: Sequence[str], warn: Callable[[str], None]
) -> None:
    """Refuses weights in memory that cannot be merged, all at once, and warns of numbers that are merely kept."""
    problems = nonfinite(base, touched, "base")
    for name, task in tasks.items():
        with gathering(problems), _naming(name):
            check_task(base, task, touched)
            raise_all(CheckpointError, nonfinite(task, touched, "task"))
    raise_all(CheckpointError, problems)
    for where, params in (("base", base), *((f"task {name!r}", task) for name, task in tasks.items())):
        for kept in nonfinite(params, params.keys() - set(touched), where, are_touched=False):
            warn(str(kept))


@contextlib.contextmanager
def _naming(task: str) -> Iterator[None]:
    """Says which task it is that a rule refuses."""
    try:
        yield
    except NufiltError as error:
        found = (p._replace(where=f"task {task!r}") if p.where == "task" else p for p in error.problems)
        raise type(error)(*found) from error
