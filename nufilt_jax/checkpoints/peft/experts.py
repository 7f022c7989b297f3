"""Experts by their names: transformers 5 has those of a block in one array, for which peft joins an adapter's."""

import re
from collections.abc import Iterable

from nufilt_jax.checkpoints.reader import Checkpoint

_EXPERT = re.compile(r"(?P<block>.+\.experts\.)(?P<number>\d+)(?P<leaf>\..+)")


def is_expert(module: str) -> bool:
    """Whether a module is one of several experts."""
    return _EXPERT.fullmatch(module) is not None


def missing_experts(modules: Iterable[str], base: Checkpoint) -> dict[str, str]:
    """The base's other experts of the blocks of which some are given: by module, one that is given.

    Args:
      modules: as the model's class calls them, which may put a prefix before the names in the base's files.
      base: the base.
    """
    given = {module: found for module in modules if (found := _EXPERT.fullmatch(module))}
    numbers = dict[tuple[str, str], set[str]]()
    for info in base.tensors.values():
        if found := _EXPERT.fullmatch(info.stored_name.removesuffix(".weight")):
            numbers.setdefault((found["block"], found["leaf"]), set()).add(found["number"])
    others = dict[str, str]()
    for (block, leaf), one in {(found["block"], found["leaf"]): one for one, found in given.items()}.items():
        known = (numbers[key] for key in numbers if block.endswith(key[0]) and leaf == key[1])
        others |= {f"{block}{number}{leaf}": one for number in sorted(set().union(*known), key=int)}
    return {module: one for module, one in others.items() if module not in given}


def called_as_experts(modules: Iterable[str]) -> tuple[str, ...]:
    """Modules that are no experts and end as those do, by which peft may take them for experts."""
    modules = tuple(modules)
    ends = {module.rpartition(".")[2] for module in modules if is_expert(module)}
    return tuple(module for module in modules if not is_expert(module) and module.rpartition(".")[2] in ends)
