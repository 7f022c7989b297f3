"""How an adapter calls the modules of its base: in the names of either series of transformers, of any class."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nufilt_jax.checkpoints.names import names_like
from nufilt_jax.checkpoints.newer_names import newer_names
from nufilt_jax.checkpoints.prefixes import match_names, without_wrappers
from nufilt_jax.checkpoints.reader import Checkpoint
from nufilt_jax.checkpoints.tensors import TensorInfo

Pairs = dict[str, dict[str, TensorInfo]]  # by module, its factors `a` and `b`


def canonical_of(base: Checkpoint, adapter: Checkpoint, pairs: Pairs, full: Mapping[str, TensorInfo]) -> dict[str, str]:
    """The base's name of every module's weight and of every full tensor."""
    weights = {module: f"{without_wrappers(module, base)}.weight" for module in pairs}
    spelt = names_like([*weights.values(), *full], base.tensors)
    newer = newer_names({*spelt.values(), *base.tensors}, base.config)  # names of both series meet in these
    ours = {newer[name]: name for name in base.tensors}
    shapes = {weights[m]: (pair["b"].shape[0], pair["a"].shape[1]) for m, pair in pairs.items()}
    wanted = {
        newer[spelt[name]]: dataclasses.replace(next(iter(adapter.tensors.values())), name=spelt[name], shape=shape)
        for name, shape in (*shapes.items(), *((name, info.shape) for name, info in full.items()))
    }
    newer_base = dataclasses.replace(base, tensors={name: base.tensors[ours[name]] for name in ours})
    matched = match_names(newer_base, dataclasses.replace(adapter, tensors=wanted), ours)
    new = dict(zip(wanted, matched.task.tensors, strict=True))
    found = {name: _spelt_as(ours, new[newer[spelt[name]]], newer[spelt[name]], spelt[name]) for name in spelt}
    return {module: found[weight] for module, weight in weights.items()} | {name: found[name] for name in full}


def _spelt_as(ours: Mapping[str, str], matched: str, newer: str, spelt: str) -> str:
    """The base's name, or where it has none that which was not matched, as it was."""
    return ours.get(matched, spelt if matched == newer else matched)


def is_newer(modules: Mapping[str, str], config: Mapping[str, Any]) -> bool | None:
    """Whether modules are called as in transformers 5; None if it calls none of them otherwise.

    Args:
      modules: what an adapter calls them, by the base's canonical name.
      config: the base's.
    """
    ours, theirs = newer_names(modules, config), newer_names(modules.values(), config)
    differing = [module for name, module in modules.items() if ours[name] != name]
    return any(theirs[module] == module for module in differing) if differing else None


def is_whole(name: str, called: str) -> bool:
    """Whether an adapter holds a tensor itself, so that it calls that and not its module."""
    return called.endswith(name[name.rfind(".") :])


def in_series_of(theirs: Mapping[str, str], ours: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """What an adapter calls its modules and whole tensors, in the series of another adapter.

    Args:
      theirs: by the base's canonical name.
      ours: of the other adapter, likewise.
      config: the base's.
    """
    wanted = is_newer(ours, config)
    if wanted:
        newer = newer_names(theirs.values(), config)
        return {name: newer[module] for name, module in theirs.items()}
    if wanted is None or not is_newer(theirs, config):
        return dict(theirs)
    return {name: name if is_whole(name, called) else name.rpartition(".")[0] for name, called in theirs.items()}
