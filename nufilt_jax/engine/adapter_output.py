"""The merged model as an adapter: what keeps it from being one, how its modules are called, and writing it."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nufilt_jax.anatomy import is_head, is_vocabulary, shape_in, tensor_of
from nufilt_jax.checkpoints import AdaptedCheckpoint, Checkpoint
from nufilt_jax.checkpoints.folders import FLAX
from nufilt_jax.checkpoints.orientation import stored_axes
from nufilt_jax.checkpoints.peft.keys import parse_key
from nufilt_jax.checkpoints.peft.spelling import in_series_of, is_whole
from nufilt_jax.checkpoints.peft.writer import NewPair, lacking_head, saved_by_type, write_adapter
from nufilt_jax.checkpoints.prefixes import without_wrappers
from nufilt_jax.checkpoints.ties import is_tied, table_of, usual_head
from nufilt_jax.engine.merged import merged_tensors
from nufilt_jax.engine.plan import Plan
from nufilt_jax.linalg.factored import Factored
from nufilt_jax.output.facts import MergedAdapter

_CARRIED = ("task_type", "auto_mapping", "fan_in_fan_out")  # of the first adapter's config into the merged one's


def told_of(plan: Plan) -> MergedAdapter:
    """What is known of the adapter to be written, from those that are at hand and, of others, from the recipe."""
    recorded = _recorded(plan)
    modules, config = dict(recorded.modules), dict(recorded.config)
    for task in plan.tasks.values():
        if not isinstance(task, AdaptedCheckpoint):
            continue
        theirs = {name: pair.module for name, pair in task.factors.items()}
        held = [copy for info in _whole(task) for copy in info.copies]  # a head that is one with its table beside that
        theirs |= {info.name: without_wrappers(parse_key(info.stored_name).name, task.base) for info in held}
        theirs = in_series_of(theirs, modules, task.base.config)
        old, new = _prefixes(theirs, modules)
        renamed = {name: new + module.removeprefix(old) if old or new else module for name, module in theirs.items()}
        # Where one holds whole what others adapt, it goes out whole, and is called as a tensor.
        whole = {n: called for n, called in renamed.items() if is_whole(n, called)}
        modules = renamed | modules | {n: whole[n] for n in whole if not is_whole(n, modules.get(n, ""))}
        config = config or {key: task.config[key] for key in _CARRIED if task.config.get(key) is not None}
    if lacking_head(plan.base, config.get("task_type")):
        del config["task_type"]  # peft would not load the adapter; `engine.factors` tells of it
    return MergedAdapter(modules=modules, config=config)


def _recorded(plan: Plan) -> MergedAdapter:
    """The adapter that is gone on with."""
    return (plan.recorded and plan.recorded.recipe.adapter) or MergedAdapter()


def _prefixes(theirs: Mapping[str, str], ours: Mapping[str, str]) -> tuple[str, str]:
    """In what the names of two adapters differ, which may have been trained with different classes of one model."""
    for name in sorted(theirs.keys() & ours.keys()):  # a set's own order is another in every process
        if is_whole(name, theirs[name]) != is_whole(name, ours[name]):
            continue  # a tensor and its module end differently, whatever they begin with
        reversed_names = theirs[name][::-1], ours[name][::-1]
        alike = len(os.path.commonprefix(reversed_names))  # noqa: RUF071  characters are meant
        return theirs[name][: len(theirs[name]) - alike], ours[name][: len(ours[name]) - alike]
    return "", ""


def _whole(task: AdaptedCheckpoint) -> Iterator[Any]:
    """Tensors that the adapter holds whole."""
    yield from (info for name, info in task.tensors.items() if info.spans and name in {x.name for x in task.stored})


def write_merged_adapter(plan: Plan, delta: Mapping[str, Any], told: MergedAdapter, out: Path) -> MergedAdapter:
    """Writes the adapter, and says what of the merge it holds.

    Args:
      plan: of the merge.
      delta: D by layer, on the host.
      told: how the modules are called.
      out: a new or empty folder.

    Returns:
      What was told, with ranks and what they lose.
    """
    most, pairs, whole = plan.settings.adapter_out_rank, dict[str, NewPair](), list[str]()
    energies = dict[str, tuple[float, float]]()  # by module, of what is written and of D; where a rank was cut
    total = 0.0
    ranks = {name: stack.ranks for row in plan.rows for stack in row.stacks for name in stack.layers}
    for layer in plan.selection.layers + plan.selection.other:
        if layer not in told.modules:
            continue  # no task changed it
        module, shape, known = told.modules[layer], shape_in(plan.base.tensors, layer), ranks.get(layer)
        if not _is_adapted(layer, module, shape, known):
            whole.append(layer)
            continue
        rank = _dense_rank(plan, layer, module, shape) if known is None else max(1, len(_used(delta[layer].rows)))
        cut = rank if most is None else min(rank, most)
        if known is not None and cut == rank:
            total += 0.0 if most is None else float(np.sum(np.square(delta[layer].rows, dtype=np.float64)))
            made = functools.partial(_factors, delta, layer)
        else:
            made = functools.partial(_cut, delta, layer, cut, module, energies)
        pairs[module] = NewPair(cut, shape, made)
    modules = {name: told.modules[name] for name in map(tensor_of, whole)}
    beside = _beside(plan, told, modules)
    values = merged_tensors(plan.base.read(modules), delta) | plan.base.read(beside)
    named = {
        _stored_name((modules | beside)[name], pairs): _as_its_class(value, name, plan.base)
        for name, value in values.items()
    }
    named |= {head: named[modules[table]] for head, table in _heads(plan.base, told, modules).items()}
    write_adapter(out, pairs, plan.base, whole=named, settings=told.config, dtype=plan.settings.dtype)
    rows = {
        module: {"rank": pair.rank, "energy_lost": round(_lost(*energies.get(module, (0.0, 0.0))), 9)}
        for module, pair in pairs.items()
    }
    held, of_cut = (sum(column) for column in zip((0.0, 0.0), *energies.values(), strict=True))
    share = _lost(total + held, total + of_cut)
    rank = max((pair.rank for pair in pairs.values()), default=0)
    return dataclasses.replace(told, rank=rank, energy_lost=share, layers=rows)


def _beside(plan: Plan, told: MergedAdapter, whole: Mapping[str, str]) -> dict[str, str]:
    """What peft looks for beside `whole`, and the merge leaves as the base has it; by name, as its class calls it.

    Of a module that is saved it is every tensor, and of some types of task the head, whoever asked for it.
    """
    task_type = told.config.get("task_type")
    others = {name: called for name, called in told.modules.items() if is_whole(name, called) and name not in whole}
    heads = {name: called for name, called in others.items() if saved_by_type(_module(called), task_type)}
    saved = {name: called for name, called in whole.items() if not name.endswith(".bias")} | heads
    called = {_module(name): _module(theirs) for name, theirs in saved.items()}
    every = (name for name in plan.base.tensors if _module(name) in called and name not in whole)
    return {name: f"{called[_module(name)]}.{name.rpartition('.')[2]}" for name in every}


def _heads(base: Checkpoint, told: MergedAdapter, whole: Mapping[str, str]) -> dict[str, str]:
    """Heads that are one with a table in `whole`, to which peft gives weights of their own; each with its table."""
    found = dict[str, str]()
    for table, called in whole.items():
        info = base.tensors[table]
        if not is_vocabulary(table):
            continue
        heads = [copy.name for copy in info.aliases if is_head(copy.name)]
        heads += [name for name in told.modules if table_of(name, info.shape, base.tensors, base.config) == table]
        if not heads and is_tied(base.config) and not any(map(is_head, base.tensors)):
            heads = [usual_head(called)]
        found |= {told.modules.get(head, head): table for head in heads if head}
    return found


def _module(name: str) -> str:
    """Of a tensor."""
    return name.rpartition(".")[0]


def _as_its_class(value: Any, name: str, base: Checkpoint) -> Any:
    """A whole tensor, `[d_out, d_in]`, as the model's torch class has it."""
    info = base.tensors[name]
    axes = stored_axes(name, info.shape, base.config) if base.format == FLAX else info.axes
    return value if axes == tuple(range(len(axes))) else np.asarray(value).transpose(np.argsort(axes))


def _lost(held: float, of_all: float) -> float:
    """The share of an energy that is not held."""
    return max(1 - held / of_all, 0.0) if of_all > 0 else 0.0


def _is_adapted(layer: str, module: str, shape: tuple[int, ...], ranks: tuple[int, ...] | None) -> bool:
    """Whether a layer goes out in factors; what some task holds whole stands in place of the base's."""
    return ranks is not None or (len(shape) == 2 and layer.endswith(".weight") and not is_whole(layer, module))


def _dense_rank(plan: Plan, layer: str, module: str, shape: tuple[int, ...]) -> int:
    """Of a layer so small that its D was kept whole: the ranks of its tasks, or as many as there can be."""
    before = 0
    if len(plan.tasks) < len(plan.sources):  # tasks that are not at hand are in the adapter that is continued
        recorded = _recorded(plan).layers
        before = min(shape) if recorded is None else recorded.get(module, {}).get("rank", 0)
    tasks = [task for task in plan.tasks.values() if isinstance(task, AdaptedCheckpoint)]
    ranks = (task.factors[layer].rank for task in tasks if layer in task.factors)
    return min(before + sum(ranks), *shape)


def _stored_name(name: str, pairs: Mapping[str, NewPair]) -> str:
    """A whole tensor as peft calls it: what belongs to an adapted module is in its base layer."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}" if module in pairs else name


def _used(rows: Any) -> Int[np.ndarray, " used"]:
    """Which rows of a factor say anything: ranks are filled up with zeros, see `engine.factors`."""
    return np.flatnonzero(np.any(np.asarray(rows) != 0, axis=1))


def _factors(delta: Mapping[str, Any], layer: str) -> tuple[np.ndarray, np.ndarray]:
    found = delta[layer]
    used = _used(found.rows)
    if not len(used):  # peft knows no rank of 0
        used = np.zeros(1, int)
    return np.asarray(found.rows)[used], np.asarray(found.basis)[:, used]


def _cut(
    delta: Mapping[str, Any], layer: str, rank: int, module: str, energies: dict[str, tuple[float, float]]
) -> tuple[np.ndarray, np.ndarray]:
    """`truncated` of a layer, when it is written; its energies are told under its module."""
    a, b, energies[module] = truncated(delta[layer], rank)
    return a, b


def truncated(delta: Any, rank: int) -> tuple[Float[np.ndarray, "k n"], Float[np.ndarray, "m k"], tuple[float, float]]:
    """The best A and B of a rank for D, factored or not, and the energies of B A and of D; in float64, on the host."""
    basis, rows = (delta.basis, delta.rows) if isinstance(delta, Factored) else (None, delta)
    rows = np.asarray(rows, np.float64)
    if rows.shape[0] < rows.shape[1]:
        q, triangle = np.linalg.qr(rows.T)
        v, s, ut = np.linalg.svd(triangle, full_matrices=False)
        u, vt = ut.T, (q @ v).T  # of the transpose, in which U and V change places
    else:
        u, s, vt = np.linalg.svd(rows, full_matrices=False)
    b = u[:, :rank] * s[:rank]
    b = b if basis is None else np.asarray(basis, np.float64) @ b
    energies = float(np.sum(s[:rank] ** 2)), float(np.sum(s**2))
    return vt[:rank].astype(np.float32), b.astype(np.float32), energies
