"""The merged model as an adapter: what keeps it from being one, how its modules are called, and writing it."""

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from nufilt_jax.anatomy import shape_in, tensor_of
from nufilt_jax.checkpoints import AdaptedCheckpoint
from nufilt_jax.checkpoints.peft.keys import parse_key
from nufilt_jax.checkpoints.peft.writer import NewPair, write_adapter
from nufilt_jax.engine.merged import merged_tensors
from nufilt_jax.engine.plan import Plan
from nufilt_jax.linalg.factored import Factored

_CARRIED = ("task_type", "auto_mapping", "fan_in_fan_out")  # of the first adapter's config into the merged one's


class Told(NamedTuple):
    """What is known of the adapter to be written.

    Attributes:
      modules: what the model's class calls the module of a layer, by canonical name; as the adapters call it.
      config: settings taken over from the first adapter.
    """

    modules: Mapping[str, str]
    config: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """For the recipe, from which a merge is gone on with when the adapters are no longer there."""
        return {"modules": dict(self.modules), "config": dict(self.config)}


def told_of(plan: Plan) -> Told:
    """From the adapters that are at hand and, of those merged earlier, from the recipe."""
    recorded = plan.recorded.recipe.adapter if plan.recorded else {}
    modules, config = dict(recorded.get("modules", {})), dict(recorded.get("config", {}))
    for task in plan.tasks.values():
        if not isinstance(task, AdaptedCheckpoint):
            continue
        theirs = {name: pair.module for name, pair in task.factors.items()}
        theirs |= {info.name: parse_key(info.stored_name).name for info in _whole(task)}
        old, new = _prefixes(theirs, modules)
        renamed = {name: new + module.removeprefix(old) if old or new else module for name, module in theirs.items()}
        modules = renamed | modules
        config = config or {key: task.config[key] for key in _CARRIED if task.config.get(key) is not None}
    return Told(modules, config)


def _prefixes(theirs: Mapping[str, str], ours: Mapping[str, str]) -> tuple[str, str]:
    """In what the names of two adapters differ, which may have been trained with different classes of one model."""
    for name in theirs.keys() & ours.keys():
        reversed_names = theirs[name][::-1], ours[name][::-1]
        alike = len(os.path.commonprefix(reversed_names))  # noqa: RUF071  characters are meant
        return theirs[name][: len(theirs[name]) - alike], ours[name][: len(ours[name]) - alike]
    return "", ""


def _whole(task: AdaptedCheckpoint) -> Iterator[Any]:
    """Tensors that the adapter holds whole."""
    yield from (info for name, info in task.tensors.items() if info.spans and name in {x.name for x in task.stored})


def write_merged_adapter(plan: Plan, delta: Mapping[str, Any], told: Told, out: Path) -> dict[str, Any]:
    """Writes the adapter, and says what of the merge it holds.

    Args:
      plan: of the merge.
      delta: D by layer, on the host.
      told: how the modules are called.
      out: a new or empty folder.

    Returns:
      The rank, the share of D's energy that a lower rank than that of the factors loses, and both by module.
    """
    most, pairs, whole = plan.settings.adapter_out_rank, dict[str, NewPair](), list[str]()
    energies = dict[str, tuple[float, float]]()  # by module, of what is written and of D; where a rank was cut
    total = 0.0
    ranks = {name: stack.ranks for row in plan.rows for stack in row.stacks for name in stack.layers}
    for layer in plan.selection.layers + plan.selection.other:
        if layer not in told.modules:
            continue  # no task changed it
        module, shape, known = told.modules[layer], shape_in(plan.base.tensors, layer), ranks.get(layer)
        if not _is_adapted(plan, layer, shape, known):
            whole.append(layer)
            continue
        rank = min(sum(known), *shape) if known is not None else _dense_rank(plan, layer, module, shape)
        cut = rank if most is None else min(rank, most)
        if known is not None and cut == rank:
            total += 0.0 if most is None else float(np.sum(np.square(delta[layer].rows, dtype=np.float64)))
            made = functools.partial(_factors, delta, layer, rank)
        else:
            made = functools.partial(_cut, delta, layer, cut, module, energies)
        pairs[module] = NewPair(cut, shape, made)
    values = merged_tensors(plan.base.read(dict.fromkeys(map(tensor_of, whole))), delta)
    named = {_stored_name(told.modules[name], pairs): value for name, value in values.items()}
    write_adapter(out, pairs, plan.base, whole=named, settings=told.config, dtype=plan.settings.dtype)
    rows = {
        module: {"rank": pair.rank, "energy_lost": round(_lost(*energies.get(module, (0.0, 0.0))), 9)}
        for module, pair in pairs.items()
    }
    held, of_cut = (sum(column) for column in zip((0.0, 0.0), *energies.values(), strict=True))
    share = _lost(total + held, total + of_cut)
    return {"rank": max((row["rank"] for row in rows.values()), default=0), "energy_lost": share, "layers": rows}


def _lost(held: float, of_all: float) -> float:
    """The share of an energy that is not held."""
    return max(1 - held / of_all, 0.0) if of_all > 0 else 0.0


def _is_adapted(plan: Plan, layer: str, shape: tuple[int, ...], ranks: tuple[int, ...] | None) -> bool:
    """Whether a layer goes out in factors; what some task holds whole stands in place of the base's."""
    if ranks is not None:
        return True
    tasks = [task for task in plan.tasks.values() if isinstance(task, AdaptedCheckpoint)]
    is_whole = any(layer not in t.factors and t.tensors[layer] is not plan.base.tensors[layer] for t in tasks)
    return len(shape) == 2 and layer.endswith(".weight") and not is_whole


def _dense_rank(plan: Plan, layer: str, module: str, shape: tuple[int, ...]) -> int:
    """Of a layer so small that its D was kept whole: the ranks of its tasks, or as many as there can be."""
    before = 0
    if len(plan.tasks) < len(plan.sources):  # tasks that are not at hand are in the adapter that is continued
        recorded = plan.recorded.recipe.adapter.get("layers") if plan.recorded else None
        before = min(shape) if recorded is None else recorded.get(module, {}).get("rank", 0)
    tasks = [task for task in plan.tasks.values() if isinstance(task, AdaptedCheckpoint)]
    ranks = (task.factors[layer].rank for task in tasks if layer in task.factors)
    return min(before + sum(ranks), *shape)


def _stored_name(name: str, pairs: Mapping[str, NewPair]) -> str:
    """A whole tensor as peft calls it: what belongs to an adapted module is in its base layer."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}" if module in pairs else name


def _factors(delta: Mapping[str, Any], layer: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
    found = delta[layer]
    basis, rows = np.asarray(found.basis), np.asarray(found.rows)
    missing = max(0, rank - rows.shape[0])
    basis, rows = np.pad(basis, ((0, 0), (0, missing))), np.pad(rows, ((0, missing), (0, 0)))
    return rows[:rank], basis[:, :rank]


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
        u, vt = ut.T, (q @ v).T
    else:
        u, s, vt = np.linalg.svd(rows, full_matrices=False)
    b = u[:, :rank] * s[:rank]
    b = b if basis is None else np.asarray(basis, np.float64) @ b
    energies = float(np.sum(s[:rank] ** 2)), float(np.sum(s**2))
    return vt[:rank].astype(np.float32), b.astype(np.float32), energies
