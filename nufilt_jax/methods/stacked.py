"""Tensors by name, kept as the stacks that a rule's programs take and give: nothing is copied between two steps."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray
Params = Mapping[str, Array]
Names = tuple[tuple[str, ...], ...]

_ALIGNMENT = 64  # bytes; a host array that starts on such a boundary becomes a CPU device's without a copy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Stacked(Mapping[str, Array]):
    """A mapping from names to tensors, whose leaves are stacks of tensors of one shape.

    Attributes:
      stacks: with a leading axis over the tensors.
      names: of each stack's tensors.
    """

    stacks: tuple[Array, ...]
    names: Names = dataclasses.field(metadata={"static": True})

    @functools.cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        return {name: (i, j) for i, members in enumerate(self.names) for j, name in enumerate(members)}

    def __getitem__(self, name: str) -> Array:
        i, j = self._places[name]
        return self.stacks[i][j]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __add__(self, other: "Stacked") -> "Stacked":
        return Stacked(self.stacks + other.stacks, self.names + other.names)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each tensor, by name."""
        pairs = zip(self.names, self.stacks, strict=True)
        return {name: stack.shape[1:] for members, stack in pairs for name in members}

    def only(self, names: Names) -> Self:
        """The stacks of these names, which must be whole stacks."""
        by_names = dict(zip(self.names, self.stacks, strict=True))
        return type(self)(tuple(by_names[members] for members in names), names)

    def copied(self) -> Self:
        """On the device, in memory of its own."""
        return jax.tree.map(jnp.copy, self)

    def on_host(self) -> Self:
        """As host arrays; on a CPU they are the device's own."""
        return jax.tree.map(np.asarray, self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TaskVector(Stacked):
    """τ = θ_t − θ0 in float32, on the device, in the stacks of the D that it is to be merged into."""


def stack_names(shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> Names:
    """Sorts names into one stack per shape; matrices in the order of `core.stacks.group_layers`."""
    stacks: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(names):
        stacks.setdefault(shapes[name][::-1], []).append(name)
    return tuple(tuple(stacks[key]) for key in sorted(stacks))


def zeros(shapes: Mapping[str, tuple[int, ...]], names: Names) -> Stacked:
    """Zeros in float32, on the host: they take no memory until they are used."""
    return Stacked(tuple(np.zeros((len(members), *shapes[members[0]]), np.float32) for members in names), names)


def stacked(params: Params, names: Names) -> Stacked:
    """Tensors of any mapping, in float32, on the device."""
    parts = (_stack((_float32(params[name]) for name in members), len(members)) for members in names)
    return Stacked(tuple(jax.device_put(part) for part in parts), names)


def task_vector(base: Params, task: Params, names: Names) -> TaskVector:
    """τ of one task.

    Each tensor is read from the mappings once and not kept, so that they may read from files as they go.

    Args:
      base: θ0 by canonical name.
      task: θ_t.
      names: the stacks wanted, as in `MergeState.delta.names`.
    """
    return TaskVector(tuple(_difference(base, task, members) for members in names), names)


def _difference(base: Params, task: Params, members: tuple[str, ...]) -> jax.Array:
    if isinstance(task[members[0]], jax.Array) or isinstance(base[members[0]], jax.Array):
        return _subtract([task[name] for name in members], [base[name] for name in members])
    differences = (_float32(task[name]) - _float32(base[name]) for name in members)
    return jax.device_put(_stack(differences, len(members)))


@jax.jit
def _subtract(task: list[Array], base: list[Array]) -> jax.Array:
    pairs = zip(task, base, strict=True)
    return jnp.stack([jnp.asarray(t, jnp.float32) - jnp.asarray(b, jnp.float32) for t, b in pairs])


def _float32(array: Array) -> np.ndarray:
    return np.asarray(array).astype(np.float32, copy=False)


def _stack(tensors: Iterable[np.ndarray], n_tensors: int) -> np.ndarray:
    """A stack on the host, filled tensor by tensor."""
    result = np.empty(0, np.float32)
    for index, tensor in enumerate(tensors):
        if index == 0:
            result = _aligned((n_tensors, *tensor.shape))
        result[index] = tensor
    return result


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty float32 array that starts on a boundary of `_ALIGNMENT` bytes."""
    n_bytes = 4 * math.prod(shape)
    room = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + n_bytes].view(np.float32).reshape(shape)
