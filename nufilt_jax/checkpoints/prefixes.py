"""Names of a task that begin otherwise than the base's: wrappers, and backbones with and without a head."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping

from nufilt_jax.anatomy import in_block
from nufilt_jax.checkpoints.names import respelt
from nufilt_jax.checkpoints.reader import Checkpoint
from nufilt_jax.checkpoints.wrappers import around, bare, no_wrappers, within

_MOST = 3  # components of a prefix, and rounds: `module.` around `bert.`
_CANDIDATES = 8


@dataclasses.dataclass(frozen=True)
class Matched:
    """A task in the base's names.

    Attributes:
      task: with its tensors renamed.
      removed: prefix that its names had and the base's have not.
      added: prefix that the base's names have and its own had not.
      renamed: how many tensors that was.
      apart: tensors of the task that stand beside what the removed prefix is of, by canonical name.
      wrappers: of modules within, as `_orig_mod.`, that only one of the two models has in its names.
      unwrapped: how many tensors these were.
      is_holder: whether names of the base begin with the removed prefix too: then it is of what held the whole model.
    """

    task: Checkpoint
    removed: str = ""
    added: str = ""
    renamed: int = 0
    apart: frozenset[str] = frozenset()
    wrappers: tuple[str, ...] = ()
    unwrapped: int = 0
    is_holder: bool = False

    @property
    def class_prefix(self) -> str:
        """The removed prefix without wrappers: what the task's class puts before the base's names."""
        return "" if self.added or self.is_holder else no_wrappers(self.removed)


def match_names(base: Checkpoint, task: Checkpoint, wanted: Collection[str]) -> Matched:
    """Leaves out or puts before a task's names what makes more of its tensors the base's; does nothing if none lack.

    Wrappers of modules within count for nothing, in the base's names nor the task's.

    Args:
      base: the base.
      task: a model fine-tuned from it.
      wanted: canonical names that the merge needs.
    """
    if frozenset(wanted) <= task.tensors.keys():
        return Matched(task)
    ours, theirs = _plain(base, task)
    plain = dataclasses.replace(base, tensors={ours[name]: info for name, info in base.tensors.items()})
    names, removed, added = theirs, "", ""  # stored canonical -> matched
    for _ in range(_MOST):
        if frozenset(ours.get(name, name) for name in wanted) <= frozenset(names.values()):
            break
        fitting = _fits(plain, task, names)
        rounds = [(_fits(plain, task, new), kind, prefix, new) for kind, prefix, new in _attempts(plain, names)]
        rounds = [row for row in rounds if len(row[0]) > len(fitting) and _is_of_model(row[2], row[0], fitting, row[3])]
        best = max(rounds, key=lambda row: len(row[0]), default=None)
        if best is None:
            break
        _, kind, prefix, new = best
        removed, added = (removed + prefix, added) if kind == "remove" else (removed, prefix + added)
        names = new
    spelt = {short: name for name, short in ours.items()}
    new = {old: spelt.get(name, name) for old, name in names.items()}
    inner = no_wrappers(removed) or removed
    wrappers = [found for old in new if (found := {*within(old)[1]} ^ {*within(new[old])[1]})]
    return Matched(
        dataclasses.replace(task, tensors={new[x]: dataclasses.replace(task.tensors[x], name=new[x]) for x in new}),
        removed,
        added,
        renamed=sum(names[old] != theirs[old] for old in names),
        apart=frozenset(new[old] for old in new if removed and not theirs[old].startswith(removed)),
        wrappers=tuple(sorted(frozenset().union(*wrappers))),
        unwrapped=len(wrappers),
        is_holder=bool(inner) and any(name.startswith(inner) for name in base.tensors),
    )


def _plain(*models: Checkpoint) -> list[dict[str, str]]:
    """The names of models without wrappers within, or as they are if two of a model would then be one."""
    plain = [{name: within(name)[0] for name in model.tensors} for model in models]
    is_clear = all(len({*names.values()}) == len(names) for names in plain)
    return plain if is_clear else [{name: name for name in model.tensors} for model in models]


def without_wrappers(name: str, base: Checkpoint) -> str:
    """A name as the model's class has it.

    Args:
      name: of a module or a tensor, as it was called when the model ran.
      base: the model; what its names begin with is taken for its class's.
    """
    start = around(name)
    if start and not any(ours.startswith(start) for ours in base.tensors):
        name = name[len(start) :]
    return bare(name)


def _attempts(base: Checkpoint, names: Mapping[str, str]) -> list[tuple[str, str, dict[str, str]]]:
    """Renamings by one prefix: put before where the task has none of it, taken away where the base has none.

    Or where all of the task's names have it, as what holds a model puts `model.` before `model.layers` and `lm_head`.
    """
    attempts = []
    for prefix in _prefixes(names.values()):
        is_whole = all(name.startswith(prefix) for name in names.values())
        if is_whole or not any(name.startswith(prefix) for name in base.tensors):
            bared = {old: new.removeprefix(prefix) for old, new in names.items()}
            canonical = respelt(bared.values())
            spelt = {old: canonical[new] for old, new in bared.items()}
            attempts += [("remove", prefix, new) for new in ([bared] if spelt == bared else [bared, spelt])]
    for prefix in _prefixes(base.tensors):
        if not any(name.startswith(prefix) for name in names.values()):
            new = {old: prefix + name if prefix + name in base.tensors else name for old, name in names.items()}
            attempts.append(("add", prefix, new))
    return [(kind, prefix, new) for kind, prefix, new in attempts if len(set(new.values())) == len(new)]


def _prefixes(names: Collection[str]) -> list[str]:
    """The beginnings that most names share, of up to `_MOST` modules."""
    counts: Counter[str] = Counter()
    for name in names:
        modules = name.split(".")[:-1]
        counts.update(".".join(modules[:n]) + "." for n in range(1, min(_MOST, len(modules)) + 1))
    return [prefix for prefix, _ in counts.most_common(_CANDIDATES)]


def _fits(base: Checkpoint, task: Checkpoint, names: Mapping[str, str]) -> frozenset[str]:
    """The tensors, by the task's own names, that are the base's by name and shape."""
    pairs = ((old, task.tensors[old], base.tensors.get(new)) for old, new in names.items())
    return frozenset(old for old, ours, theirs in pairs if theirs is not None and ours.shape == theirs.shape)


def _is_of_model(prefix: str, fits: frozenset[str], before: frozenset[str], names: Mapping[str, str]) -> bool:
    """Whether a prefix is a model's, and not that of a single module of a model whose other names fit as they are.

    The norm of a pooler is no last norm of the base, though it would be called like that without its prefix.
    """
    gained = fits - before
    return around(prefix) == prefix or len(gained) > len(before) or any(in_block(names[old]) for old in gained)
