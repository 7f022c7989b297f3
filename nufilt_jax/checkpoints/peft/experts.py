"""Experts by their names: transformers 5 has those of a block in one array, for which peft joins an adapter's."""

import re
from collections.abc import Iterable

from nufilt_jax.checkpoints.reader import Checkpoint

_EXPERT = re.compile(r"(?P<block>.+\.experts\.)(?P<number>\d+)(?P<leaf>\..+)")


def is_expert(module: str) -> bool:
    """Whether a module is one of several experts."""
    return _EXPERT.fullmatch(module) is not None


def missing_experts(modules: Iterable[str], base: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The base's other modules of the experts of which some are given, each with the shape of its weight.

    peft drops what a block's experts have if it finds no factors of all of them, or of one of their modules.

    Args:
      modules: as the model's class calls them, which may put a prefix before the names in the base's files.
      base: the base.
    """
    given = dict.fromkeys(modules)
    blocks = dict.fromkeys(found["block"] for module in given if (found := _EXPERT.fullmatch(module)))
    others = dict[str, tuple[int, ...]]()
    for info in base.tensors.values():
        found = _EXPERT.fullmatch(info.stored_name.removesuffix(".weight"))
        if found is None or not info.stored_name.endswith(".weight") or len(info.shape) != 2:
            continue
        ours = (block for block in blocks if block.endswith(found["block"]))
        others |= {f"{block}{found['number']}{found['leaf']}": info.shape for block in ours}
    return {module: shape for module, shape in others.items() if module not in given}


def called_as_experts(modules: Iterable[str]) -> tuple[str, ...]:
    """Modules that are no experts and end as those do, by which peft may take them for experts."""
    modules = tuple(modules)
    ends = {module.rpartition(".")[2] for module in modules if is_expert(module)}
    return tuple(module for module in modules if not is_expert(module) and module.rpartition(".")[2] in ends)
