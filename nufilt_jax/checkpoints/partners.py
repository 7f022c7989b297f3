"""Whether a task's checkpoint fits the base's."""

from collections.abc import Collection, Iterable, Iterator

from nufilt_jax.checkpoints.dtypes import FLOATS, INTEGERS
from nufilt_jax.checkpoints.folders import ADDED
from nufilt_jax.checkpoints.reader import Checkpoint
from nufilt_jax.checkpoints.tensors import TensorInfo
from nufilt_jax.checkpoints.ties import is_copy
from nufilt_jax.errors import Problem

_LISTED = 3  # tensors of one prefix that are named one by one; more are summed up
_SAME_CLASS = "all models must be fine-tuned from this base"


def partner_problems(base: Checkpoint, task: Checkpoint, touched: Collection[str]) -> list[Problem]:
    """Everything that keeps a task from being merged into a base.

    A task may lack tensors that are not touched, integer buffers, and copies of tied tensors. It may hold
    nothing that the base has no place for, integer buffers apart. Float types may differ. Neither may have parameters
    that a merge added.

    Args:
      base: the base.
      task: a model fine-tuned from it.
      touched: canonical names of the tensors that the merge reads.
    """
    return [
        *_mixtures(base, task),
        *_missing(base, task, touched),
        *_unequal(base, task, touched),
        *_homeless(base, task),
    ]


def _mixtures(*models: Checkpoint) -> Iterator[Problem]:
    for model in models:
        if model.has_added:
            what = f"has weights that are mixed anew for every batch ({ADDED}), and these cannot be merged"
            yield Problem(model.source, what, "continue that merge with --add, or merge the models that it came from")


def _missing(base: Checkpoint, task: Checkpoint, touched: Iterable[str]) -> Iterator[Problem]:
    lacking = [name for name in touched if name not in base.tensors]
    yield from _named(base.source, lacking, "is not in the base", "exclude it with --layers")
    lost = [base.tensors[name].stored_name for name in touched if name in base.tensors.keys() - task.tensors.keys()]
    what = f"is missing, but the base {base.source} has it"
    yield from _named(task.source, lost, what, f"{_SAME_CLASS}, or exclude it with --layers")


def _unequal(base: Checkpoint, task: Checkpoint, touched: Iterable[str]) -> Iterator[Problem]:
    for name in touched:
        if name not in base.tensors or name not in task.tensors:
            continue
        ours, theirs = base.tensors[name], task.tensors[name]
        if ours.shape != theirs.shape:
            what = f"has shape {list(theirs.shape)}, but {list(ours.shape)} in the base {base.source}"
            fix = f"{_SAME_CLASS}; resize it first, or exclude it with --layers"
            yield Problem(str(theirs.file), what, fix, theirs.stored_name)
        for info in (ours, theirs):
            if info.dtype not in FLOATS:
                what = f"holds {info.dtype}, but only {', '.join(sorted(FLOATS))} can be merged"
                fix = "dequantize the model, or exclude it with --layers"
                yield Problem(str(info.file), what, fix, info.stored_name)


def _homeless(base: Checkpoint, task: Checkpoint) -> Iterator[Problem]:
    """Tensors of the task that the base lacks."""
    ties = {alias.name: info.name for info in base.tensors.values() for alias in info.aliases}
    extra = []
    for name, info in task.tensors.items():
        if name in base.tensors or info.dtype in INTEGERS:
            continue
        if name not in ties:
            extra.append(info.stored_name)
        elif not _is_tied_in(task, info, ties[name]):
            what = f"differs from {ties[name]}, but the base {base.source} ties the two"
            yield Problem(str(info.file), what, _SAME_CLASS, info.stored_name)
    what = f"is not in the base {base.source}"
    yield from _named(task.source, extra, what, "save the task with the base's model class, or take a larger base")


def _is_tied_in(task: Checkpoint, info: TensorInfo, main: str) -> bool:
    other = task.tensors.get(main)
    return other is None or is_copy(other, info, compare_bytes=task.is_local)


def _named(where: str, names: Iterable[str], what: str, fix: str) -> Iterator[Problem]:
    """One problem per tensor, or one per prefix where many share it, as in `text_model.* (196 tensors)`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        separator = "/" if "/" in name else "."
        head, dot, _ = name.partition(separator)
        groups.setdefault(f"{head}{dot}*" if dot else name, []).append(name)
    for prefix, members in groups.items():
        many = len(members) > _LISTED
        for tensor in [f"{prefix} ({len(members)} tensors)"] if many else members:
            yield Problem(where, what, fix, tensor)
