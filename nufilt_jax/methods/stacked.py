"""Tensors by name, kept as the stacks that a rule's programs take and give: nothing is copied between two steps."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from nufilt_jax.anatomy import layer_shape, part_of, tensor_of
from nufilt_jax.linalg.factored import Factored
from nufilt_jax.values import native

Tensor = jax.Array | np.ndarray  # of host or device; inside one layer's program it is jaxtyping's, a `jax.Array`
Params = Mapping[str, Tensor]
TensorStacks = tuple[Any, ...]  # arrays or factored, of any shapes, each with a leading axis over its tensors
Names = tuple[tuple[str, ...], ...]
Ranks = Mapping[str, tuple[int, ...]]  # of layers whose D is factored: what every task adds at most

_ALIGNMENT = 64  # bytes; a host array that starts on such a boundary becomes a CPU device's without a copy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Stacked(Mapping[str, Tensor]):
    """A mapping from names to tensors, whose leaves are stacks of tensors of one shape.

    Attributes:
      stacks: with a leading axis over the tensors.
      names: of each stack's tensors.
    """

    stacks: TensorStacks
    names: Names = dataclasses.field(metadata={"static": True})

    @functools.cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        return {name: (i, j) for i, members in enumerate(self.names) for j, name in enumerate(members)}

    def __getitem__(self, name: str) -> Tensor:
        i, j = self._places[name]
        return self.stacks[i][j]

    def __contains__(self, name: object) -> bool:
        return name in self._places  # a mapping's own would make a slice to find out

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


@runtime_checkable
class InParts(Protocol):
    """Parameters of which one matrix of a stack of experts can be read alone."""

    def part(self, name: str, index: int) -> Tensor:
        """Matrix number `index` of a tensor."""
        ...


@runtime_checkable
class Changes(Protocol):
    """Parameters of a task that know of themselves how they differ from the base's, as those of an adapter do."""

    def is_unchanged(self, name: str) -> bool:
        """Whether a tensor is the base's own."""
        ...

    def change(self, name: str) -> tuple[Tensor, Tensor] | None:
        """τ of a matrix as factors `[m, r]` and `[r, n]`, in float32; None of one that has none."""
        ...


def layer_of(params: Params, layer: str) -> Tensor:
    """A layer of a model, by the names of `anatomy.layers_in`."""
    name, index = part_of(layer)
    if index is not None:
        return params.part(name, index) if isinstance(params, InParts) else native(params[name][index])
    tensor = native(params[name])
    return tensor.reshape(layer_shape(layer, tensor.shape)) if layer != name else tensor


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


def groups_of(delta: Stacked) -> tuple[Group, ...]:
    """The stacks of D as groups of one width, in their order; each factored stack is a group of its own."""
    groups = list[Group]()
    may_join = False
    for members, stack in zip(delta.names, delta.stacks, strict=True):
        width, is_dense = stack.shape[-1], not isinstance(stack, Factored)
        if may_join and is_dense and groups[-1].width == width:
            groups[-1] = Group(width, (*groups[-1].stacks, members))
        else:
            groups.append(Group(width, (members,)))
        may_join = is_dense
    return tuple(groups)


def stack_names(shapes: Mapping[str, tuple[int, ...]], names: Iterable[str], ranks: Ranks | None = None) -> Names:
    """Sorts names of layers into one stack per shape, those that are factored also by their ranks.

    Matrices in the order of `group_layers`, of each shape the dense ones first.
    """
    stacks: dict[tuple[Any, ...], list[str]] = {}
    for name in sorted(names):
        stacks.setdefault((shapes[name][::-1], (ranks or {}).get(name, ())), []).append(name)
    return tuple(tuple(stacks[key]) for key in sorted(stacks))


def zeros(shapes: Mapping[str, tuple[int, ...]], names: Names, ranks: Ranks | None = None) -> Stacked:
    """Zeros in float32, on the host: they take no memory until they are used."""

    def stack(members: tuple[str, ...]) -> Any:
        shape, n_layers, ours = shapes[members[0]], len(members), (ranks or {}).get(members[0])
        if ours is None:
            return np.zeros((n_layers, *shape), np.float32)
        parts = (shape[0], total_rank(ours)), (total_rank(ours), shape[1])
        return Factored(*(np.zeros((n_layers, *part), np.float32) for part in parts))

    return Stacked(tuple(map(stack, names)), names)


def total_rank(ranks: Iterable[int]) -> int:
    """Of a factored D: as many rows as all tasks together add, and one if that is none."""
    return max(1, sum(ranks))


def stacked(params: Params, names: Names) -> Stacked:
    """Tensors of any mapping, those in factors multiplied out, in float32, on the device."""
    parts = (_stack((_float32(params[name]) for name in members), len(members)) for members in names)
    return Stacked(tuple(jax.device_put(part) for part in parts), names)


def restacked(params: Params, names: Names) -> TensorStacks:
    """Tensors of a mapping, such as a `Stacked` was made, as stacks again."""
    return tuple(jnp.stack([jnp.asarray(params[name]) for name in members]) for members in names)


def task_vector(base: Params, task: Params, names: Names, ranks: Sequence[int | None] | None = None) -> TaskVector:
    """τ of one task.

    Each tensor is read from the mappings once and not kept, so that they may read from files as they go.

    Args:
      base: θ0 by canonical name.
      task: θ_t.
      names: the stacks wanted, as in `MergeState.delta.names`.
      ranks: of each stack, the rank in which τ is wanted, of a task that knows of its changes; None for a dense one.
    """
    wanted = zip(names, ranks or [None] * len(names), strict=True)
    stacks = (_difference(base, task, x) if rank is None else _factored(base, task, x, rank) for x, rank in wanted)
    return TaskVector(tuple(stacks), names)


def _factored(base: Params, task: Params, members: tuple[str, ...], rank: int) -> Factored:
    """τ of a stack of matrices in factors; those that are not adapted, and ranks that are less, filled with zeros."""
    m, n = layer_of(base, members[0]).shape
    basis, rows = _aligned((len(members), m, rank)), _aligned((len(members), rank, n))
    basis[:], rows[:] = 0, 0
    for i, name in enumerate(members):
        factors = task.change(name) if isinstance(task, Changes) and rank else None
        if factors is not None:
            left, right = factors
            # On the host and in float64: the columns are few, and nothing is lost where they are nearly dependent.
            q, triangle = np.linalg.qr(left.astype(np.float64))
            basis[i, :, : q.shape[1]], rows[i, : q.shape[1]] = q, triangle @ right
    return jax.device_put(Factored(basis, rows))


def _difference(base: Params, task: Params, members: tuple[str, ...]) -> jax.Array:
    if isinstance(task, Changes):
        return jax.device_put(_stack((_told_change(base, task, name) for name in members), len(members)))
    pairs = ((layer_of(task, name), layer_of(base, name)) for name in members)
    first = next(pairs)
    # What a device holds already is subtracted there.
    if any(isinstance(x, jax.Array) for x in first):
        return _subtract([first, *pairs])
    # One tensor at a time, into the stack's own memory: no second copy of a model is ever held.
    changes = (_change(*pair) for pair in itertools.chain([first], pairs))
    return jax.device_put(_stack(changes, len(members)))


def _told_change(base: Params, task: Params, layer: str) -> np.ndarray:
    """τ of a layer of a task that knows of its changes: what it did not change is not read."""
    if isinstance(task, Changes) and (factors := task.change(layer)) is not None:
        return np.matmul(*factors)
    if isinstance(task, Changes) and task.is_unchanged(tensor_of(layer)):
        return np.zeros(layer_of(base, layer).shape, np.float32)
    return _change(layer_of(task, layer), layer_of(base, layer))


def _change(task: Tensor, base: Tensor) -> np.ndarray:
    """θ_t − θ0, subtracted in float64 where a file holds that: in float32 a small change would be lost."""
    theirs, ours = np.asarray(task), np.asarray(base)
    wide = np.float64 if np.float64 in (theirs.dtype, ours.dtype) else np.float32
    return (theirs.astype(wide, copy=False) - ours.astype(wide, copy=False)).astype(np.float32, copy=False)


@jax.jit
def _subtract(pairs: list[tuple[Tensor, Tensor]]) -> jax.Array:
    return jnp.stack([(_wide(t) - _wide(b)).astype(jnp.float32) for t, b in pairs])


def _wide(x: Tensor) -> jax.Array:
    """In float32, or in float64 if it is that."""
    return jnp.asarray(x, jnp.float64 if x.dtype == np.float64 else jnp.float32)


def _float32(array: Any) -> np.ndarray:
    return whole(array).astype(np.float32, copy=False)


def whole(array: Any) -> np.ndarray:
    """A tensor on the host, multiplied out if it is in factors."""
    return np.asarray(array.outputs(slice(None)) if isinstance(array, Factored) else array)


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
