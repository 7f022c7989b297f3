"""Which layers a merge keeps in factors, in which ranks, and how they come from the disk and go there."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nufilt_jax.anatomy import shape_in, tensor_of
from nufilt_jax.checkpoints import AdaptedCheckpoint, Checkpoint
from nufilt_jax.checkpoints.peft.writer import lacking_head
from nufilt_jax.config import problem
from nufilt_jax.engine.grid import Stack
from nufilt_jax.engine.job import Job
from nufilt_jax.errors import Problem
from nufilt_jax.linalg.factored import Factored
from nufilt_jax.methods import find
from nufilt_jax.methods.selection import Selection
from nufilt_jax.methods.stacked import Ranks, Stacked, stacked
from nufilt_jax.output.recipe import Settings
from nufilt_jax.output.stored import Stored

_STEP = 4  # ranks above it are filled up to multiples of it, so that few programs serve patterns of many ranks


def ranks_of(
    job: Job, base: Checkpoint, tasks: tuple[Checkpoint, ...], selection: Selection, stored: Stored
) -> dict[str, tuple[int, ...]]:
    """Of every layer whose D is to be kept in factors, the rank that each of the job's tasks may add to it.

    Those that all tasks leave or adapt, if the method can, and if two thin matrices are smaller than the whole one.
    What tasks added whose files are not opened counts as the first one's.
    """
    if not find(job.settings.method).in_factors:
        return {}
    found = {}
    for layer in selection.layers + selection.other:
        shape = shape_in(base.tensors, layer)
        # Factors are known by whole tensors: not of a matrix in a stack of experts, nor of a kernel laid flat.
        if layer != tensor_of(layer) or len(shape) != 2:
            continue
        before = stored.rank(layer) if stored.done(layer) else 0
        added = [_added(task, base, layer) for task in tasks]
        if before is None or None in added:
            continue
        merged = [before if number == 0 else 0 for number in range(job.n_merged)]
        ranks = (*merged, *(rank or 0 for rank in added))
        if _pays(sum(ranks), shape):
            found[layer] = ranks
    return found


def _added(task: Checkpoint, base: Checkpoint, layer: str) -> int | None:
    """The rank that a task adds to a layer; None if it holds the whole layer."""
    if isinstance(task, AdaptedCheckpoint) and layer in task.factors:
        return _padded(task.factors[layer].rank)
    # The same object: what an adapter leaves as it was is listed with the base's own entry.
    return 0 if task.tensors.get(layer) is base.tensors.get(layer) else None


def _padded(rank: int) -> int:
    return rank if rank <= _STEP else -(-rank // _STEP) * _STEP


def _pays(rank: int, shape: tuple[int, ...]) -> bool:
    m, n = shape
    return rank * (m + n) < m * n


def window_ranks(stacks: tuple[Stack, ...]) -> Ranks:
    """Of the factored layers of a window, their ranks."""
    return {layer: stack.ranks for stack in stacks if stack.ranks is not None for layer in stack.layers}


def task_rank(stack: Stack, number: int, task: Checkpoint, *, in_factors: bool) -> int | None:
    """The rank in which the τ of a task is formed, for a stack; None for a dense one.

    Beside a dense D too, a thin τ is cheaper to work with.
    """
    if stack.ranks is not None:
        return stack.ranks[number]
    if not (in_factors and stack.is_solved and isinstance(task, AdaptedCheckpoint) and len(stack.shape) == 2):
        return None
    factors = [task.factors.get(layer) for layer in stack.layers]
    ranks = [_padded(pair.rank) for pair in factors if pair is not None]
    is_thin = len(ranks) == len(factors) and _pays(max(ranks, default=0), stack.shape)
    return max(ranks) if is_thin else None


def zeros_of(stack: Stack, rank: int | None) -> Any:
    """τ of a stack as `task_vector` forms it, in zeros, which take no memory until they are used."""
    n_layers = len(stack.layers)
    if rank is None:
        return np.zeros((n_layers, *stack.shape), np.float32)
    m, n = stack.shape
    return Factored(np.zeros((n_layers, m, rank), np.float32), np.zeros((n_layers, rank, n), np.float32))


def restored(found: Mapping[str, Any], like: Stacked) -> Stacked:
    """D on the device as it was kept, in the stacks of `like`, which is zero."""
    stacks = []
    for members, stack in zip(like.names, like.stacks, strict=True):
        if not isinstance(stack, Factored):
            stacks += stacked(found, (members,)).stacks
            continue
        basis, rows = np.zeros(stack.basis.shape, np.float32), np.zeros(stack.rows.shape, np.float32)
        for i, name in enumerate(members):
            used = found[name].rank
            basis[i, :, :used], rows[i, :used] = found[name].basis, found[name].rows
        stacks.append(jax.device_put(Factored(basis, rows)))
    return Stacked(tuple(stacks), like.names)


def kept(delta: Stacked, stacks: tuple[Stack, ...], done: int) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """D for the disk, group by group: what is not used yet of factors is left out.

    Args:
      delta: on the host.
      stacks: of the window.
      done: number of tasks that are merged.

    Returns:
      The groups of arrays, and the rank of every factored layer.
    """
    ranks = {layer: sum(found[:done]) for layer, found in window_ranks(stacks).items()}
    groups: dict[str, dict[str, Any]] = {"delta": {}, "basis": {}, "rows": {}}
    for name, found in delta.items():
        x: Any = found
        if name in ranks:
            groups["basis"][name] = np.ascontiguousarray(x.basis[:, : ranks[name]])
            groups["rows"][name] = x.rows[: ranks[name]]
        else:
            groups["delta"][name] = x
    return groups, ranks


def output_problems(
    tasks: Mapping[str, Checkpoint], settings: Settings, selection: Selection, *, is_first: bool
) -> Iterator[Problem]:
    """What keeps a merge from being written as an adapter; the first of a stream has to hold something."""
    if settings.output != "adapter":
        if settings.adapter_out_rank is not None:
            yield problem("adapter_out_rank", "belongs to --output adapter", "add that, or leave it out")
        return
    if not find(settings.method).in_factors:
        what = f"adapter: {settings.method} is not linear in the factors of its tasks, so that its result has full rank"
        yield problem("output", what, "leave it out to get a whole model, and use nufilt extract on that")
    whole = [name for name, task in tasks.items() if not isinstance(task, AdaptedCheckpoint)]
    if whole:
        what = f"adapter: {', '.join(whole)}: a whole model changes its matrices in full rank, which no adapter holds"
        yield problem("output", what, "leave it out to get a whole model, and use nufilt extract on that")
    changed = {info.name for task in tasks.values() for info in task.stored}
    changed |= {name for task in tasks.values() if isinstance(task, AdaptedCheckpoint) for name in task.factors}
    touched = set(selection.touched)  # empty where the selection is refused itself; and tasks, if none can be opened
    if is_first and tasks and touched and not whole and changed.isdisjoint(touched):
        what = "adapter: no task's adapter changes any of the selected layers, so that it would be empty"
        yield problem("output", what, "select others with --layers, or leave that out")
    if settings.format is not None:
        yield problem("format", "does not go with --output adapter, which peft reads as safetensors", "leave it out")


def output_warnings(base: Checkpoint, tasks: Mapping[str, Checkpoint], settings: Settings) -> Iterator[str]:
    """What a merge that is written as an adapter leaves out of the first one's config."""
    first = next(iter(tasks.values()), None)
    if settings.output != "adapter" or not isinstance(first, AdaptedCheckpoint):
        return
    task_type = first.config.get("task_type")
    if head := lacking_head(base, task_type):
        what = f"is of task type {task_type}, with which peft looks for a {head} that the base {base.source} lacks"
        yield f"{first.source}: {what}: the merged adapter is of no type, and the head is for its user to add"
