"""From an opened PEFT folder to a task: its factors matched with the weights of a base."""

import dataclasses
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from nufilt_jax.anatomy import is_head, is_vocabulary
from nufilt_jax.checkpoints.dtypes import FLOATS
from nufilt_jax.checkpoints.folders import FLAX, PEFT
from nufilt_jax.checkpoints.newer_names import newer_names
from nufilt_jax.checkpoints.orientation import stored_axes, with_conv1d
from nufilt_jax.checkpoints.peft.adapted import AdaptedCheckpoint, LoraFactors, factor_info
from nufilt_jax.checkpoints.peft.config import CONFIG, LEAVE, MERGE, LoraConfig
from nufilt_jax.checkpoints.peft.keys import PROMPTS, Key, parse_key
from nufilt_jax.checkpoints.peft.spelling import Pairs, canonical_of, is_newer
from nufilt_jax.checkpoints.prefixes import without_wrappers
from nufilt_jax.checkpoints.quantised import is_quantised
from nufilt_jax.checkpoints.reader import Checkpoint, open_checkpoint
from nufilt_jax.checkpoints.tensors import TensorInfo
from nufilt_jax.checkpoints.ties import is_copy, is_tied, table_of
from nufilt_jax.checkpoints.wrappers import wrappers_in
from nufilt_jax.errors import CheckpointError, Problem, raise_all
from nufilt_jax.patterns import patterns

_SAVE = "save the adapter again"
_UNTIE = "train it without this module, or on a base that stores both and says tie_word_embeddings: false"


def open_task(source: str, base: Checkpoint | None, **how: Any) -> Checkpoint:
    """Opens a task, whole or an adapter.

    Args:
      source: a folder or a Hub id.
      base: the base; None if it could not be opened, and then an adapter comes unmatched.
      **how: as for `open_checkpoint`.

    Raises:
      CheckpointError: with everything that is wrong with this folder.
    """
    config = None if base is None else _oriented(base)
    task = open_checkpoint(source, role="task", model_config=config, adapters=True, **how)
    return task if base is None or task.format != PEFT else adapted(base, task)


def _oriented(base: Checkpoint) -> Mapping[str, Any]:
    """The base's config, and what its shapes tell beside: a task may hold too little to tell."""
    stored = {} if base.format == FLAX else {name: info.stored_shape for name, info in base.tensors.items()}
    return with_conv1d(base.config, stored)


def adapted(base: Checkpoint, adapter: Checkpoint) -> AdaptedCheckpoint:
    """An adapter as a task.

    Args:
      base: on which it is put.
      adapter: as `open_checkpoint` opens a PEFT folder: its tensors by stored name, its config that of the adapter.

    Raises:
      CheckpointError: another kind of adapter, or factors that do not fit their config or the base; all listed.
    """
    config = LoraConfig.of(adapter.config, f"{adapter.source}/{CONFIG}")
    pairs, full, problems = _sorted(base, adapter)
    ranks = config.ranks_of(tuple(pairs))
    problems += _rank_problems(pairs, ranks, config)
    raise_all(CheckpointError, problems)
    names = canonical_of(base, adapter, pairs, full)
    problems += _unmatched(base, adapter, pairs, names)
    raise_all(CheckpointError, problems)
    scales = config.scales_of(ranks)
    factors = {
        names[module]: LoraFactors(
            factor_info(pair["a"], names[module], "A"),
            factor_info(pair["b"], names[module], "B"),
            scales[module],
            without_wrappers(module, base),
        )
        for module, pair in pairs.items()
    }
    whole = _tied(
        base, adapter, {names[name]: dataclasses.replace(info, name=names[name]) for name, info in full.items()}
    )
    changed = {name: _entry(base.tensors[name], pair) for name, pair in factors.items()}
    unwrapped = _unwrapped(adapter, {pair.module for pair in factors.values()} | full.keys())
    notices = (
        *_other_base(base, adapter, config),
        *unwrapped,
        *_left(base, adapter, config, factors),
        *_moved_heads(base, adapter, whole),
    )
    return AdaptedCheckpoint(
        **{field.name: getattr(adapter, field.name) for field in dataclasses.fields(Checkpoint)}
        | {"tensors": {**base.tensors, **whole, **changed}, "notices": notices},
        base=base,
        factors=factors,
    )


def _entry(ours: TensorInfo, pair: LoraFactors) -> TensorInfo:
    """An adapted weight: of the base's shape, named as its factor, with no bytes of its own."""
    dtype = ours.dtype if ours.dtype in FLOATS else pair.b.dtype  # a quantised weight is the base's, and told of that
    found = {"stored_name": pair.b.stored_name, "file": pair.b.file, "dtype": dtype}
    return dataclasses.replace(ours, **found, spans=(), aliases=())


def _sorted(base: Checkpoint, adapter: Checkpoint) -> tuple[Pairs, dict[str, TensorInfo], list[Problem]]:
    """Factors by module as its config may call it, full tensors by name, laid as the base's, and what is neither."""
    model = _oriented(base)
    pairs: Pairs = {}
    full: dict[str, TensorInfo] = {}
    problems: list[Problem] = []
    for info in adapter.tensors.values():
        key = parse_key(info.stored_name)
        if key.kind in ("a", "b"):
            twice = pairs.setdefault(key.name, {}).setdefault(key.kind, info)
        elif key.kind == "full" or (key.kind == "foreign" and _is_of(base, without_wrappers(key.name, base))):
            name = without_wrappers(key.name, base)
            info = _laid_as(info, name, model)
            twice = full.setdefault(name, info)
        else:
            problems += _foreign(info, key)
            continue
        if twice is not info and not (
            key.kind not in ("a", "b")
            and is_copy(twice, info, compare_bytes=adapter.is_local)  # peft writes some heads twice
        ):
            what = f"means the same as {twice.stored_name}"
            problems.append(Problem(str(info.file), what, "keep one of the two", info.stored_name))
    if not pairs and not problems:
        what = "holds no LoRA factors" if adapter.tensors else "holds no tensors"
        problems.append(Problem(str(adapter.weight_files[0]), what, _SAVE))
    return pairs, full, problems


def _is_of(base: Checkpoint, name: str) -> bool:
    """Whether the base has a tensor that is called so in either series, with the prefix of a class or without."""
    ours = {*base.tensors, *newer_names(base.tensors, base.config).values()}
    return not ours.isdisjoint((name, _headless(name))) or name in map(_headless, ours)


def _headless(name: str) -> str:
    return name.partition(".")[2] or name


def _laid_as(info: TensorInfo, name: str, model: Mapping[str, Any]) -> TensorInfo:
    """A full tensor as a tensor of that name of the model lies, which its name in the adapter may not tell."""
    axes = stored_axes(name, info.stored_shape, model)
    return dataclasses.replace(info, axes=axes, shape=tuple(info.stored_shape[axis] for axis in axes))


def _foreign(info: TensorInfo, key: Key) -> Iterator[Problem]:
    if key.kind == "foreign":
        fix = LEAVE if key.what == PROMPTS else MERGE
        yield Problem(str(info.file), f"belongs to {key.what}, which cannot be merged", fix, info.stored_name)


def _rank_problems(pairs: Pairs, ranks: Mapping[str, int], config: LoraConfig) -> Iterator[Problem]:
    covered = config.covered(tuple(pairs))
    for module, pair in pairs.items():
        one = next(iter(pair.values()))
        if len(pair) == 1:
            lacking = f"lora_{'AB'['a' in pair]}"
            yield Problem(str(one.file), f"has no partner {lacking}", _SAVE, one.stored_name)
            continue
        a, b = pair["a"], pair["b"]
        if len(a.shape) != 2 or len(b.shape) != 2:
            what = f"has shape {list(a.shape)}: LoRA of a convolution cannot be merged"
            yield Problem(str(a.file), what, MERGE, a.stored_name)
            continue
        rank = ranks[module]
        for info, found in ((a, a.shape[0]), (b, b.shape[1])):
            if found != rank:
                what = f"has shape {list(info.shape)}, rank {found}, but {CONFIG} says r = {rank}"
                yield Problem(str(info.file), what, "use the config that was saved with it", info.stored_name)
        for info in (a, b):
            if info.dtype not in FLOATS:
                what = f"holds {info.dtype}, but only {', '.join(sorted(FLOATS))} can be merged"
                yield Problem(str(info.file), what, "save it in a float type", info.stored_name)
        if module not in covered:
            what = f"is not among the target_modules of {CONFIG}, and peft would leave it out"
            yield Problem(str(a.file), what, "use the config that was saved with it", a.stored_name)


def _unmatched(base: Checkpoint, adapter: Checkpoint, pairs: Pairs, names: Mapping[str, str]) -> Iterator[Problem]:
    tied = {alias.name: info.name for info in base.tensors.values() for alias in info.aliases}
    seen: dict[str, str] = {}
    for module, pair in pairs.items():
        name, shape = names[module], (pair["b"].shape[0], pair["a"].shape[1])
        ours, stored, file = base.tensors.get(name), pair["a"].stored_name, str(pair["a"].file)
        if name in tied or (ours is not None and ours.aliases):
            main = tied.get(name, name)
            what = f"adapts {main}, which the base {base.source} ties to another tensor"
            yield Problem(file, what, _UNTIE, stored)
        elif main := table_of(name, shape, base.tensors, base.config):
            what = f"adapts {module}, which the base {base.source} ties to {main}"
            yield Problem(file, what, _UNTIE, stored)
        elif (ours is None or ours.shape != shape) and (packed := _quantised_in(base, name)):
            what = f"adapts {module}, which is quantised in the base {base.source}: {packed.stored_name} holds"
            yield Problem(file, f"{what} {packed.dtype}", "dequantize the base first", stored)
        elif ours is None:
            what = f"adapts {module}, which is no module of the base {base.source}"
            yield Problem(file, what, "give the base that the adapter was trained on", stored)
        elif ours.shape != shape:
            what = f"changes a weight of shape {list(shape)}, which is {list(ours.shape)} in the base {base.source}"
            yield Problem(file, what, "give the base that the adapter was trained on", stored)
        elif name in seen:
            yield Problem(file, f"adapts the same weight as {seen[name]}", "keep one of the two", stored)
        seen.setdefault(name, stored)


def _quantised_in(base: Checkpoint, name: str) -> TensorInfo | None:
    """What stands for a weight in a quantised base."""
    layer = name.removesuffix("weight")
    return next((info for other, info in base.tensors.items() if other.startswith(layer) and is_quantised(info)), None)


def _tied(base: Checkpoint, adapter: Checkpoint, whole: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Full tensors, of which a head that equals its table as in the base is a copy of that."""
    listed = dict(whole)
    for name, info in whole.items():
        main = table_of(name, info.shape, base.tensors, base.config)
        if main in whole and adapter.is_local and is_copy(whole[main], info, compare_bytes=True):
            listed[main] = dataclasses.replace(listed[main], aliases=(*listed[main].aliases, listed.pop(name)))
    return listed


def _moved_heads(base: Checkpoint, adapter: Checkpoint, whole: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Tables that the adapter replaces without the head that is one with them in the base."""
    heads = {info.shape for model in (whole, base.tensors) for name, info in model.items() if is_head(name)}
    for name, info in whole.items():
        ours = base.tensors.get(name)
        if ours is None or info.aliases or not is_vocabulary(name) or info.shape in heads:
            continue
        if is_tied(base.config) or any(is_head(alias.name) for alias in ours.aliases):
            what = f"replaces {name}, which is the head too in the base {base.source}"
            yield f"{adapter.source}: {what}: both move, and merge_and_unload() of peft would leave the head as it was"


def _other_base(base: Checkpoint, adapter: Checkpoint, config: LoraConfig) -> Iterator[str]:
    said = config.base
    known = {base.source, str(base.config.get("_name_or_path", ""))}
    if not said or said in known or os.path.realpath(os.path.expanduser(said)) == os.path.realpath(base.path):
        return
    yield f"{adapter.source}: was trained on {said!r} by its {CONFIG}, and is merged onto {base.source!r}"


def _unwrapped(adapter: Checkpoint, names: Collection[str]) -> Iterator[str]:
    """What was left out of the names, which are then these."""
    kept = {wrapper for name in names for wrapper in wrappers_in(name)}
    found = [wrappers for info in adapter.tensors.values() if (wrappers := {*wrappers_in(info.stored_name)} - kept)]
    if found:
        shown = ", ".join(map(repr, sorted(set.union(*found))))
        yield f"{adapter.source}: {len(found)} names hold {shown} of a wrapper: read and written without it"


def _left(
    base: Checkpoint, adapter: Checkpoint, config: LoraConfig, factors: Mapping[str, LoraFactors]
) -> Iterator[str]:
    """Modules beside the adapted ones that should have factors, by the config, and have none."""
    if not config.says_which:
        return
    alike = os.path.commonprefix([*factors])  # noqa: RUF071  characters are meant
    tower = re.match(r"([^\W\d]\w*\.)*", alike)  # that it was trained on
    modules = {
        name.removesuffix(".weight"): name
        for name, info in base.tensors.items()
        if tower
        and name.startswith(tower[0])
        and name.endswith(".weight")
        and len(info.shape) == 2
        and name not in factors
    }
    if is_newer({name: pair.module for name, pair in factors.items()}, base.config):
        modules = dict(zip(newer_names(modules, base.config).values(), modules.values(), strict=True))
    covered = config.covered(tuple(modules))
    if left := [name for module, name in modules.items() if module in covered]:
        named = ", ".join(group.pattern for group in patterns(left))
        what = f"holds no factors of {len(left)} matrices that the target_modules of its {CONFIG} name"
        yield f"{adapter.source}: {what}, and which stay the base's: {named}"
