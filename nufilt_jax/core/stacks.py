"""A model's layers as groups of stacks."""

from collections.abc import Mapping
from typing import NamedTuple


class Group(NamedTuple):
    """All layers with one number of inputs: they share decompositions and the adapter's Adam steps.

    Attributes:
      width: n, their number of inputs.
      stacks: the names of the layers, one tuple per shape [m, n].
    """

    width: int
    stacks: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All names, stack by stack."""
        return tuple(name for stack in self.stacks for name in stack)


def group_layers(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Group, ...]:
    """Sorts matrices by input width, then by shape, then by name: the order of a file never matters.

    >>> group_layers({"b": (4, 2), "a": (4, 2), "c": (2, 2), "d": (2, 4)})
    (Group(width=2, stacks=(('c',), ('a', 'b'))), Group(width=4, stacks=(('d',),)))
    """
    widths: dict[int, dict[int, list[str]]] = {}
    for name in sorted(shapes):
        d_out, d_in = shapes[name]
        widths.setdefault(d_in, {}).setdefault(d_out, []).append(name)
    return tuple(
        Group(width, tuple(tuple(stacks[d_out]) for d_out in sorted(stacks)))
        for width, stacks in sorted(widths.items())
    )
