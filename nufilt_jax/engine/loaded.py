"""A merge in memory, one task after another, of weights that are there or of models that are read into it."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nufilt_jax import methods
from nufilt_jax.checkpoints import Checkpoint, TensorInfo, open_checkpoint, open_task, parse_source
from nufilt_jax.checkpoints.dtypes import FLOATS
from nufilt_jax.checkpoints.folders import PEFT
from nufilt_jax.checkpoints.held import held_base, held_task
from nufilt_jax.checkpoints.saving import check_place
from nufilt_jax.checkpoints.survey import squared_change
from nufilt_jax.engine.coverage import outside_warnings
from nufilt_jax.engine.merged import merged_tensors
from nufilt_jax.engine.readable import fitted, selected
from nufilt_jax.engine.writable import writing_problems
from nufilt_jax.errors import CheckpointError, NufiltError, Problem, error_of, gathering, of_kind, raise_all
from nufilt_jax.methods.selection import Selection
from nufilt_jax.methods.state import nonfinite
from nufilt_jax.output.recipe import Settings


def merged_in_memory(
    base: Any,
    tasks: Mapping[str, Any],
    settings: Settings,
    *,
    strict: bool,
    offline: bool,
    warn: Callable[[str], None],
    warnings: Sequence[str] = (),
    out: Path | None = None,
) -> methods.MergeState:
    """The merge after all tasks, of weights by canonical name or of sources, in any mixture.

    Args:
      base: the backbone.
      tasks: by name, in order.
      settings: how.
      strict: refuse tasks of which a head or a table would stay the base's.
      offline: use the local Hub cache alone.
      warn: told of what the command warns of.
      warnings: what of that is known before.
      out: where the result will be saved like the base, a source; None if it will not.

    Raises:
      NufiltError: what cannot be merged, all of it at once.
    """
    problems: list[Problem] = []
    ours, opened, selection, notices = _fitted(base, tasks, settings, problems, strict=strict, offline=offline)
    if out is not None:
        with gathering(problems):
            check_place(out)
        with gathering(problems):
            problems += writing_problems(ours, settings, out)
    weights = dict(base) if isinstance(base, Mapping) else ours.read()
    touched = selection.touched
    own = {name: _own(task, ours) for name, task in opened.items()}
    where = "base" if isinstance(base, Mapping) else ours.source
    problems += of_kind(CheckpointError, nonfinite(weights, touched, where))
    for name, task in opened.items():
        names = [x for x in touched if x in own[name]]
        problems += of_kind(CheckpointError, nonfinite(task.unread(names), names, task.source))
    if problems:
        raise error_of(problems)
    values: dict[str, Mapping[str, Any]] = {}
    for name, task in opened.items():
        values[name] = task.unread(touched)  # of a file each is read when it is asked for
        if isinstance(given := tasks[name], Mapping):  # as it is, on whatever device
            values[name] = {x: given[own[name][x].stored_name] if x in own[name] else weights[x] for x in touched}
    left = set(ours.tensors) - set(touched)
    kept = nonfinite(weights, left, where, are_touched=False)
    for name, task in opened.items():
        names = left & own[name].keys()
        kept += nonfinite(task.unread(names), names, task.source, are_touched=False)
    changes = {name: _changes(task, own[name], ours, weights) for name, task in opened.items()}
    for text in (*warnings, *notices, *map(str, kept), *outside_warnings(ours, selection, settings, changes)):
        warn(text)
    return merged_one_by_one(weights, values, settings, selection)


def _fitted(
    base: Any, tasks: Mapping[str, Any], settings: Settings, problems: list[Problem], *, strict: bool, offline: bool
) -> tuple[Checkpoint, dict[str, Checkpoint], Selection, tuple[str, ...]]:
    """The models as a merge reads them, the tensors that it touches, and what their users should know.

    What is refused goes to `problems`.
    """
    if isinstance(base, Mapping):
        ours = held_base(base, "in memory", "base")
    else:
        source, revision = parse_source(os.fspath(base))
        ours = open_checkpoint(source, revision=revision, role="base", offline=offline)
    opened: dict[str, Checkpoint] = {}
    for name, task in tasks.items():
        with gathering(problems):
            is_held = isinstance(task, Mapping)
            opened[name] = held_task(task, f"task {name!r}", ours) if is_held else _opened(task, base, ours, offline)
    selection = Selection((), ())
    with gathering(problems):
        selection = selected(ours, opened.values(), settings)
    fitting, told = fitted(ours, opened, selection, settings, problems, strict=strict)
    return ours, fitting, selection, (*ours.notices, *told)


def _opened(source: Any, base: Any, ours: Checkpoint, offline: bool) -> Checkpoint:
    name, revision = parse_source(os.fspath(source))
    if not isinstance(base, Mapping):
        return open_task(name, ours, revision=revision, offline=offline)
    task = open_checkpoint(name, revision=revision, offline=offline, adapters=True)
    if task.format == PEFT:
        what = "is a PEFT adapter, which needs a base that is a folder or Hub id"
        raise CheckpointError(Problem(name, what, "give the base's folder, or the task merged into it"))
    return task


def _own(task: Checkpoint, base: Checkpoint) -> dict[str, TensorInfo]:
    """The floating tensors that a task does not take from the base."""
    return {x: info for x, info in task.tensors.items() if info is not base.tensors.get(x) and info.dtype in FLOATS}


def _changes(
    task: Checkpoint, own: Mapping[str, TensorInfo], base: Checkpoint, weights: Mapping[str, Any]
) -> dict[str, float]:
    """Σ (θ_t − θ0)² of each floating tensor that the base has in the same shape; of those that are finite."""
    found = {}
    for name, info in own.items():
        ours = base.tensors.get(name)
        if ours is not None and ours.shape == info.shape and ours.dtype in FLOATS:
            theirs = task.unread([name])[name]
            found[name] = squared_change(theirs.reshape(-1), np.asarray(weights[name]).reshape(-1))
    return {name: x for name, x in found.items() if math.isfinite(x)}


def merged_one_by_one(
    base: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]], settings: Settings, selection: Selection
) -> methods.MergeState:
    """The merge after all tasks, of weights that fit.

    Args:
      base: the backbone's, by canonical name.
      tasks: by name, in order; the tensors selected.
      settings: how.
      selection: by these settings.

    Raises:
      NufiltError: what a rule refuses.
    """
    how = {name: getattr(settings, name) for name in ("seed", "layers", "conv", "other_params")}
    rule = methods.get(settings.method, settings.config, selection=selection, **how)
    state = rule.init(base)
    for name, task in tasks.items():
        with _naming(name):
            state = rule.update(state, task, donate=True)
    return state


def rounded(state: methods.MergeState, where: str) -> dict[str, np.ndarray]:
    """The merged model, in the base's own types.

    Args:
      state: after all tasks.
      where: what messages call the base.

    Raises:
      CheckpointError: these types cannot hold it.
    """
    with np.errstate(over="ignore"):  # told with the tensor's name
        merged = {name: np.asarray(value) for name, value in state.merged.items()}
    what, fix = "has numbers out of the range of", "give a base of a wider type"
    over = (name for name in state.touched if not np.isfinite(merged[name]).all())
    raise_all(CheckpointError, [Problem(where, f"{what} {merged[name].dtype}", fix, name) for name in over])
    return merged


def unrounded(state: methods.MergeState) -> dict[str, Any]:
    """The merged model for those who write it and round it then, once."""
    return state.base | merged_tensors({name: state.base[name] for name in state.touched}, state.delta) | state.added


@contextlib.contextmanager
def _naming(task: str) -> Iterator[None]:
    """Says which task it is that a rule refuses."""
    try:
        yield
    except NufiltError as error:
        found = (p._replace(where=f"task {task!r}") if p.where == "task" else p for p in error.problems)
        raise type(error)(*found) from error
