"""What only reading the weights can tell: their hashes, and numbers that are not finite."""

import dataclasses
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from nufilt_jax.checkpoints import Checkpoint, nonfinite_tensors
from nufilt_jax.errors import CheckpointError, Problem, raise_all
from nufilt_jax.pipeline.plan import Plan
from nufilt_jax.pipeline.recorded import other_weights_problem

_READERS = 4  # threads; more only compete for the disk
_NONFINITE = "has NaN or infinite numbers"


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Found by reading all of a plan's weights once.

    Attributes:
      base_sha256: of the base's weight files by name.
      task_sha256: the same by task name, for all tasks.
      warnings: non-finite numbers in tensors that the merge does not touch.
    """

    base_sha256: dict[str, str]
    task_sha256: dict[str, dict[str, str]]
    warnings: tuple[str, ...]
    changes: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


def inspect(plan: Plan) -> Inspection:
    """Hashes all weight files and looks for numbers that are not finite.

    Raises:
      CheckpointError: files that changed since an earlier run, and non-finite numbers in tensors that the merge
        touches, all listed.
    """
    (base_sha256, *task_sha256), nonfinite = _read_all(plan)
    hashes = dict(zip(plan.tasks, task_sha256, strict=True))
    problems = list(_changes(plan, base_sha256, hashes))
    warnings: list[str] = []
    for checkpoint, names in zip((plan.base, *plan.tasks.values()), nonfinite, strict=True):
        refused, accepted = _nonfinite_problems(checkpoint, names, set(plan.selection.touched))
        problems += refused
        warnings += map(str, accepted)
    raise_all(CheckpointError, problems)
    merged = {} if plan.recorded is None else {task.name: dict(task.sha256 or {}) for task in plan.recorded.tasks}
    return Inspection(base_sha256, merged | hashes, tuple(warnings))


def _read_all(plan: Plan) -> tuple[list[dict[str, str]], list[list[str]]]:
    """Hashes, and names of tensors that are not finite, of the base and the plan's tasks; several files at a time."""
    checkpoints = (plan.base, *plan.tasks.values())
    stop = threading.Event()

    def nonfinite(checkpoint: Checkpoint) -> list[str]:
        return [] if plan.is_finished else nonfinite_tensors(checkpoint, checkpoint.tensors, stop=stop)

    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1), thread_name_prefix="inspect") as pool:
        try:
            hashes = pool.map(lambda checkpoint: checkpoint.sha256(stop=stop), checkpoints)
            return list(hashes), list(pool.map(nonfinite, checkpoints))
        finally:
            stop.set()


def _changes(plan: Plan, base_sha256: dict[str, str], hashes: dict[str, dict[str, str]]) -> Iterator[Problem]:
    """The models that are not what they were when an earlier run began this merge."""
    if plan.recorded is None:
        return
    pairs = [(plan.base, plan.recorded.base, base_sha256)]
    pairs += [(plan.tasks[t.name], t, hashes[t.name]) for t in plan.recorded.tasks if t.name in plan.tasks]
    for checkpoint, then, now in pairs:
        if found := other_weights_problem(checkpoint.source, then.sha256 or {}, now, plan.recorded.folder):
            yield found


def _nonfinite_problems(
    checkpoint: Checkpoint, names: Iterable[str], touched: set[str]
) -> tuple[list[Problem], list[Problem]]:
    """Tensors with non-finite numbers: those that the merge would use, and those that it leaves alone."""
    refused, accepted = [], []
    for name in names:
        info = checkpoint.tensors[name]
        if name in touched:
            fix = "fine-tune again, or exclude it with --layers"
            refused.append(Problem(str(info.file), _NONFINITE, fix, info.stored_name))
        else:
            what = f"{_NONFINITE}; the merge does not touch it"
            accepted.append(Problem(str(info.file), what, tensor=info.stored_name))
    return refused, accepted
