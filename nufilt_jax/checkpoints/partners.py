"""Whether a task's checkpoint fits the base's, and what of it stays the base's."""

import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from nufilt_jax.anatomy import in_block, is_buffer, is_head, is_norm, is_vocabulary, multi_token_prediction
from nufilt_jax.checkpoints.dtypes import FLOATS, INTEGERS
from nufilt_jax.checkpoints.folders import ADDED
from nufilt_jax.checkpoints.prefixes import Matched, match_names
from nufilt_jax.checkpoints.reader import Checkpoint
from nufilt_jax.checkpoints.tensors import TensorInfo
from nufilt_jax.checkpoints.ties import is_copy
from nufilt_jax.errors import Problem

_LISTED = 3  # tensors of one prefix that are named one by one; more are summed up
_SAME_CLASS = "all models must be fine-tuned from this base"
_UNMERGED = re.compile(r"\.(?:base_layer|lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(?:\.|$)")
_UNLOAD = "its LoRA is not merged into it: save the task after merge_and_unload() of peft"


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A task as the merge reads it.

    Attributes:
      task: in the base's names; tensors that stay the base's are the base's own, so that they count as unchanged.
      renamed: what of its names was read otherwise than stored.
      kept: heads and tables that stay the base's, or that the base has no place for, and why.
      problems: what keeps the task from being merged.
      class_prefix: what its class puts before the base's names, as `transformer.` before those of a bare GPT-2.
    """

    task: Checkpoint
    renamed: tuple[str, ...] = ()
    kept: Mapping[str, str] = dataclasses.field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    class_prefix: str = ""

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user of a merge did not get."""
        return tuple(f"{self.task.source}: {notice}" for notice in (*self.renamed, *_staying(self.kept)))


def fit(
    base: Checkpoint, task: Checkpoint, touched: Collection[str], *, asked_for: bool = False, strict: bool = False
) -> Fitted:
    """Compares a task with the base.

    A task may lack tensors that are not touched, computed buffers, and copies of tied tensors, and float types may
    differ. Heads that one of the two lacks, or has in another size, grown vocabularies, and blocks for multi-token
    prediction that only one of the two has stay the base's. Anything else that the base has no place for is a problem,
    and so are parameters that a merge added.

    Args:
      base: the base.
      task: a model fine-tuned from it.
      touched: canonical names of the tensors that the merge reads.
      asked_for: whether the user's own expression selected them: then no head and no table of them may differ.
      strict: make problems of all notices.
    """
    matched = match_names(base, task, touched)
    task, is_touched = matched.task, frozenset(touched)
    kept = {} if asked_for else {name: what for name in touched if (what := _own_head(base, task, name))}
    kept |= {name: what for name in base.tensors if name not in is_touched and (what := _other_size(base, task, name))}
    if not is_touched <= (dropped := _dropped(base, task)):  # else nothing would be left to merge
        kept |= {name: _none_in_task(base, name) for name in touched if name in dropped}
    extra = _extra(base, task)
    tied = {alias.name for info in base.tensors.values() for alias in info.aliases}
    apart = matched.apart | _dropped(task, base)
    heads = dict.fromkeys(name for name in extra if (is_head(name) or name in apart) and name not in tied)
    merged = [name for name in touched if name not in kept]
    problems = [
        *_mixtures(base, task),
        *_missing(base, task, merged),
        *_unequal(base, task, merged),
        *_homeless(base, task, [name for name in extra if name not in heads]),
    ]
    own = kept | {name: "the base has none" for name in heads}
    renamed = tuple(_renamed(matched))
    if strict:
        fix = "leave out --strict to keep the base's"
        problems += [Problem(task.source, what, fix, _stored(base, task, name)) for name, what in own.items()]
        problems += [Problem(task.source, notice, "leave out --strict") for notice in renamed]
        renamed, own = (), {}
    tensors = {name: info for name, info in task.tensors.items() if name not in heads}
    tensors |= {name: base.tensors[name] for name in kept if name in is_touched}
    task = dataclasses.replace(task, tensors=tensors)
    return Fitted(task, renamed, own, tuple(problems), matched.class_prefix)


def _dropped(one: Checkpoint, other: Checkpoint) -> frozenset[str]:
    """The blocks for multi-token prediction of a model, if another has none of them: loading and saving drops them."""
    blocks = multi_token_prediction(one.tensors)
    return blocks if blocks.isdisjoint(other.tensors) else frozenset()


def _own_head(base: Checkpoint, task: Checkpoint, name: str) -> str:
    """Why a touched tensor stays the base's; empty if it is to be merged, or refused."""
    ours, theirs = base.tensors.get(name), task.tensors.get(name)
    if ours is None or (theirs is None and not (is_head(name) or _is_replaced(base, task, name))):
        return ""
    if theirs is None:
        return _none_in_task(base, name)
    grown = is_vocabulary(name) and ours.shape[1:] == theirs.shape[1:]
    if ours.shape == theirs.shape or not (grown or is_head(name)) or theirs.dtype not in FLOATS:
        return ""
    return _two_shapes(ours, theirs)


def _is_replaced(base: Checkpoint, task: Checkpoint, name: str) -> bool:
    """Whether a norm behind the blocks gives place to one of a head of the task, as to that of a pooler."""
    ours, leaf = base.tensors[name], name.rpartition(".")[2]
    return (
        is_norm(name)
        and not in_block(name)
        and any(
            is_norm(other) and is_head(other) and other.endswith(f".{leaf}") and info.shape == ours.shape
            for other, info in task.tensors.items()
            if other not in base.tensors
        )
    )


def _other_size(base: Checkpoint, task: Checkpoint, name: str) -> str:
    """How a tensor that is not touched differs in shape, if it does and is no buffer."""
    ours, theirs = base.tensors[name], task.tensors.get(name)
    if theirs is None or ours.shape == theirs.shape or {ours.dtype, theirs.dtype} & INTEGERS:
        return ""
    return "" if is_buffer(name, ours.shape) else _two_shapes(ours, theirs)


def _none_in_task(base: Checkpoint, name: str) -> str:
    return f"{list(base.tensors[name].shape)} in the base, none in the task"


def _two_shapes(ours: TensorInfo, theirs: TensorInfo) -> str:
    return f"{list(theirs.shape)}, {list(ours.shape)} in the base"


def _extra(base: Checkpoint, task: Checkpoint) -> list[str]:
    """Parameters of the task that the base lacks; copies of tied ones are looked at by `_homeless`."""
    return [
        name
        for name, info in task.tensors.items()
        if name not in base.tensors and info.dtype not in INTEGERS and not is_buffer(name, info.shape) and info.size
    ]


def _renamed(matched: Matched) -> Iterator[str]:
    if matched.removed:
        where = " before the base's own names" if matched.is_holder else ", which the base's do not"
        yield f"{matched.renamed} names begin with {matched.removed!r}{where}: read without it"
    if matched.wrappers:
        shown = ", ".join(map(repr, matched.wrappers))
        yield f"{matched.unwrapped} names differ from the base's by {shown} of a wrapper: read as the base's"
    if matched.added:
        yield f"{matched.renamed} names lack the base's prefix {matched.added!r}: read with it"


def _staying(kept: Mapping[str, str]) -> Iterator[str]:
    """One line that counts what stays the base's."""
    if kept:
        tensors = (
            "1 tensor is not merged and stays" if len(kept) == 1 else f"{len(kept)} tensors are not merged and stay"
        )
        yield f"{tensors} the base's: {listed(kept)}; --strict refuses that"


def listed(kept: Mapping[str, str]) -> str:
    """The first of some tensors, each with what is said of it, and the number of the others."""
    shown = ", ".join(f"{name} ({what})" for name, what in list(kept.items())[:4])
    return shown + (f" and {len(kept) - 4} more" if len(kept) > 4 else "")


def _stored(base: Checkpoint, task: Checkpoint, name: str) -> str:
    return (task.tensors.get(name) or base.tensors[name]).stored_name


def _mixtures(*models: Checkpoint) -> Iterator[Problem]:
    for model in models:
        if model.has_added:
            what = f"has weights that are mixed anew for every batch ({ADDED}), and these cannot be merged"
            yield Problem(model.source, what, "continue that merge with --add, or merge the models that it came from")


def _missing(base: Checkpoint, task: Checkpoint, touched: Collection[str]) -> Iterator[Problem]:
    lacking = [name for name in touched if name not in base.tensors]
    yield from _named(base.source, lacking, "is not in the base", "exclude it with --layers")
    lost = [base.tensors[name].stored_name for name in touched if name in base.tensors.keys() - task.tensors.keys()]
    what = f"is missing, but the base {base.source} has it"
    is_unmerged = any(map(_UNMERGED.search, task.tensors))
    yield from _named(
        task.source, lost, what, _UNLOAD if is_unmerged else f"{_SAME_CLASS}, or exclude it with --layers"
    )


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


def _homeless(base: Checkpoint, task: Checkpoint, names: Iterable[str]) -> Iterator[Problem]:
    """Tensors of the task that the base lacks."""
    ties = {alias.name: info.name for info in base.tensors.values() for alias in info.aliases}
    extra = []
    for name in names:
        info = task.tensors[name]
        if name not in ties:
            extra.append(info.stored_name)
        elif not _is_tied_in(task, info, ties[name]):
            what = f"differs from {ties[name]}, but the base {base.source} ties the two"
            yield Problem(str(info.file), what, _SAME_CLASS, info.stored_name)
    is_unmerged = any(map(_UNMERGED.search, extra))
    fix = _UNLOAD if is_unmerged else "save the task with the base's model class, or take a larger base"
    yield from _named(task.source, extra, f"is not in the base {base.source}", fix)


def _is_tied_in(task: Checkpoint, info: TensorInfo, main: str) -> bool:
    other = task.tensors.get(main)
    return other is None or is_copy(other, info, compare_bytes=task.is_local)


def _named(where: str, names: Iterable[str], what: str, fix: str) -> Iterator[Problem]:
    """One problem per tensor, or one per prefix where many share it, as in `text_model.* (196 tensors)`.

    Of many the first is named whole: prefixes alone do not tell what the names of two models differ in.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.split("[./]", name, maxsplit=1)[0], []).append(name)
    for members in groups.values():
        if len(members) <= _LISTED:
            yield from (Problem(where, what, fix, name) for name in members)
            continue
        alike = len(os.path.commonprefix([min(members), max(members)]))  # noqa: RUF071  characters are meant
        many = re.sub(r"[^./]*$", "*", members[0][:alike], count=1) + f" ({len(members)} tensors)"
        yield Problem(where, f"{what}; the first is {members[0]}", fix, many)
