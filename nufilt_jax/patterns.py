"""Many names as few patterns: `model.layers.*.self_attn.{q,k,v,o}_proj`."""

import re
from collections.abc import Iterable
from typing import NamedTuple


class NameGroup(NamedTuple):
    """Names that differ in numbers, or in their last module.

    Attributes:
      pattern: `*` for numbers, `{q,k}_proj` for modules.
      kinds: how many modules.
      names: all.
    """

    pattern: str
    kinds: int
    names: tuple[str, ...]


_USUAL = ("q", "k", "v", "o", "out", "gate", "up", "down", "query", "key", "value")  # as the models list them
_PROJECTIONS = _USUAL[:8]
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=\[)\d+(?=\])|^\d+(?=\.)")


def patterns(names: Iterable[str]) -> list[NameGroup]:
    """Names as few patterns, in the order given.

    >>> [g.pattern for g in patterns(f"layers.{i}.attn.{p}_proj.weight" for i in range(2) for p in "qk")]
    ['layers.*.attn.{q,k}_proj']
    """
    forms: dict[str, list[str]] = {}
    for name in names:
        forms.setdefault(_NUMBER.sub("*", name), []).append(name)
    siblings: dict[tuple[str, str, int], list[str]] = {}
    for form, members in forms.items():
        head, module, tail = _split(form)
        siblings.setdefault((head, tail, len(members)), []).append(module)
    groups = []
    for (head, tail, _), modules in siblings.items():
        modules.sort(key=lambda module: _USUAL.index(module) if module in _USUAL else len(_USUAL))
        joined = modules[0] if len(modules) == 1 else "{" + ",".join(modules) + "}"
        members = tuple(name for module in modules for name in forms[head + module + tail])
        groups.append(NameGroup((head + joined + tail).removesuffix(".weight"), len(modules), members))
    return groups


def _split(form: str) -> tuple[str, str, str]:
    """`a.*.attn.`, `q`, `_proj.weight` of `a.*.attn.q_proj.weight`: what siblings differ in stands in the middle.

    Fused matrices keep their whole name.
    """
    stem, leaf = form, ""
    for suffix in (".weight", ".bias"):
        if form.endswith(suffix):
            stem, leaf = form.removesuffix(suffix), suffix
    parent, dot, module = stem.rpartition(".")
    first = module.removesuffix("_proj")
    is_plain = first != module and first in _PROJECTIONS
    return (parent + dot, first, "_proj" + leaf) if is_plain else (parent + dot, module, leaf)


def expression(groups: Iterable[NameGroup]) -> str:
    """A regular expression that finds the names of all groups but single ones, which heads mostly are."""
    many = [group for group in groups if len(group.names) > group.kinds] or list(groups)
    modules = dict.fromkeys(
        ".".join(part for part in _NUMBER.sub("*", name).split(".")[-2:] if part != "*")
        for group in many
        for name in group.names
    )
    return "(" + "|".join(re.escape(module) for module in modules) + ")$"
