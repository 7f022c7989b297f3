"""What only reading the weights can tell: their hashes, numbers that cannot be used, and how far tasks moved."""

import dataclasses
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nufilt_jax.anatomy import tensor_of
from nufilt_jax.checkpoints import AdaptedCheckpoint, Checkpoint, Findings, TensorInfo, survey_file
from nufilt_jax.checkpoints.dtypes import OUTPUT_DTYPES
from nufilt_jax.checkpoints.folders import SAFETENSORS
from nufilt_jax.checkpoints.outputs import new_types, range_problem
from nufilt_jax.checkpoints.peft.adapted import weight_of
from nufilt_jax.engine.memory import READERS
from nufilt_jax.engine.plan import Plan
from nufilt_jax.engine.unchanged import HashedFiles, stamp_of
from nufilt_jax.errors import CheckpointError, Problem, raise_all
from nufilt_jax.methods.selection import Selection
from nufilt_jax.methods.state import nonfinite_problem
from nufilt_jax.output.model import Model


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Found by reading all of a plan's weights once.

    Attributes:
      base_sha256: of the base's weight files by name.
      task_sha256: the same by task name, for all tasks.
      warnings: non-finite numbers in tensors that the merge does not touch.
      files: those that were hashed, as they were then.
      changes: by task name, of the tasks whose files were read: Σ (θ_t − θ0)² by canonical name, of the floating
        tensors that the base has in the same shape; those that are not finite are left out. None are known of a merge
        that was finished.
    """

    base_sha256: dict[str, str]
    task_sha256: dict[str, dict[str, str]]
    warnings: tuple[str, ...]
    files: HashedFiles
    changes: dict[str, dict[str, float]]


def inspect(plan: Plan) -> Inspection:
    """Reads all weight files once, several at a time.

    Raises:
      CheckpointError: files that changed since an earlier run, non-finite numbers in tensors that the merge touches,
        and numbers in the others that the type to be written cannot hold, all listed.
    """
    files = HashedFiles()
    base, *tasks = _read_all(plan, files)
    hashes = {name: _sha256(findings, plan.tasks[name]) for name, findings in zip(plan.tasks, tasks, strict=True)}
    base_sha256 = plan.base.header_sha256() if _is_unread(plan) else _sha256(base, plan.base)
    problems = [*_replaced(plan, base_sha256, hashes), *_range_problems(plan, base)]
    warnings: list[str] = []
    for checkpoint, findings in zip((plan.base, *plan.tasks.values()), (base, *tasks), strict=True):
        nonfinite = frozenset[str]().union(*(found.nonfinite for found in findings))
        broken = (info for info in checkpoint.stored if info.name in nonfinite)
        refused, accepted = _nonfinite_problems(broken, plan.selection)
        problems += refused
        warnings += map(str, accepted)
    raise_all(CheckpointError, problems)
    merged = (
        {} if plan.recorded is None else {task.name: dict(task.sha256 or {}) for task in plan.recorded.recipe.tasks}
    )
    changes = {name: _changes(plan.tasks[name], findings) for name, findings in zip(plan.tasks, tasks, strict=True)}
    return Inspection(base_sha256, merged | hashes, tuple(warnings), files, changes)


def _is_unread(plan: Plan) -> bool:
    """Whether the base's weights need not be read: its header tells all that an adapter depends on."""
    return plan.settings.output == "adapter" and plan.base.format == SAFETENSORS


def _read_all(plan: Plan, files: HashedFiles) -> list[list[Findings]]:
    """The findings in each weight file of the base, and of each of the plan's tasks."""
    stop = threading.Event()
    code = None if plan.settings.dtype is None else OUTPUT_DTYPES[plan.settings.dtype]
    kept = {name: new for name, new in new_types(plan.base, code).items() if name not in plan.selection.touched}

    def survey(checkpoint: Checkpoint, index: int) -> Findings:
        path = checkpoint.weight_files[index]
        if checkpoint is plan.base and _is_unread(plan):
            return Findings("", frozenset(), frozenset(), {})
        # When nothing will be merged, hashes alone are compared.
        tensors = [info for info in checkpoint.stored if info.file == path and not plan.is_finished]
        how: dict[str, Any] = {"new_types": kept} if checkpoint is plan.base else {"base": plan.base.tensors}
        stamp = stamp_of(path)
        found = survey_file(path, tensors, stop=stop, **how)
        files.add(path, stamp, found.sha256)
        return found

    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1), thread_name_prefix="inspect") as pool:
        try:
            coming = [
                [pool.submit(survey, checkpoint, index) for index in range(len(checkpoint.weight_files))]
                for checkpoint in (plan.base, *plan.tasks.values())
            ]
            return [[future.result() for future in futures] for futures in coming]
        finally:
            stop.set()  # after a failure the other threads would read their files to the end


def _sha256(findings: Iterable[Findings], checkpoint: Checkpoint) -> dict[str, str]:
    """The hash of each weight file by name, as `Checkpoint.sha256` gives it."""
    names = (path.relative_to(checkpoint.path).as_posix() for path in checkpoint.weight_files)
    return {name: found.sha256 for name, found in zip(names, findings, strict=True)}


def _changes(task: Checkpoint, findings: Iterable[Findings]) -> dict[str, float]:
    found = {name: x for part in findings for name, x in part.changes.items()}
    if isinstance(task, AdaptedCheckpoint):
        found |= task.squared_changes()
    # One NaN in their sum would leave no tensor a share.
    return {name: x for name, x in found.items() if math.isfinite(x)}


def _range_problems(plan: Plan, findings: Iterable[Findings]) -> Iterator[Problem]:
    """Tensors that the merge leaves alone, and that cannot be written: what the others will hold is not known yet."""
    lost = frozenset[str]().union(*(found.out_of_range for found in findings))
    for name, info in plan.base.tensors.items():
        if name in lost and plan.settings.dtype is not None:
            yield range_problem(info, OUTPUT_DTYPES[plan.settings.dtype], info.stored_name)


def _replaced(plan: Plan, base_sha256: Mapping[str, str], hashes: Mapping[str, Mapping[str, str]]) -> Iterator[Problem]:
    """The models that are not what they were when an earlier run began this merge, or another that it repeats."""
    if plan.recorded is None:
        base, *tasks = plan.promised
        known = [
            (plan.base, base, _as_promised(plan, base, base_sha256)),
            *((plan.tasks[t.name], t, hashes[t.name]) for t in tasks),
        ]
        for checkpoint, then, now in known:
            if then.sha256 is not None:
                yield from then.changes(now, checkpoint.source)
        return
    recipe, folder = plan.recorded.recipe, plan.recorded.folder
    pairs = [(plan.base, recipe.base, base_sha256)]
    pairs += [(plan.tasks[t.name], t, hashes[t.name]) for t in recipe.tasks if t.name in plan.tasks]
    for checkpoint, then, now in pairs:
        yield from then.changes(now, checkpoint.source, folder)


def _as_promised(plan: Plan, base: Model, now: Mapping[str, str]) -> Mapping[str, str]:
    """The base's hashes as another recipe holds them: of its header, if that merge's output was an adapter."""
    is_alike = base.sha256 is None or not now.keys().isdisjoint(base.sha256)
    return now if is_alike else plan.base.sha256_as(base.sha256 or {})


def _nonfinite_problems(tensors: Iterable[TensorInfo], selection: Selection) -> tuple[list[Problem], list[Problem]]:
    """Tensors with non-finite numbers: those that the merge would use, and those that it leaves alone."""
    refused, accepted = [], []
    touched, layers = set(selection.touched), set(map(tensor_of, selection.layers))
    for info in tensors:
        is_touched = weight_of(info.name) in touched
        # Those outside the layers are merged at the user's wish, of which --layers is no part.
        way_out = (
            {} if weight_of(info.name) in layers else {"way_out": "keep the base's with --other-params pretrained"}
        )
        found = nonfinite_problem(str(info.file), info.stored_name, is_touched=is_touched, **way_out)
        (refused if is_touched else accepted).append(found)
    return refused, accepted
