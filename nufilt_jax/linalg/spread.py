"""Stacks divided among devices: each device of a one-dimensional mesh solves some of the layers, and asks no other.

One program runs on all of them, `shard_map` over the mesh, with no collective operation. Accelerators work at the same
time. The devices of a CPU share its cores, on which never two LAPACK calls may be in flight (see `linalg.dispatch`):
they take turns. The program then runs once for every device, and all but the one whose turn it is leave their layers as
they are.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Shaped

from nufilt_jax.linalg.dispatch import run_alone
from nufilt_jax.linalg.programs import Program

AXIS = "layers"

# For each stack, what takes its place, and what else there is to tell of it.
Found = tuple[tuple[Any, Any], ...]
Function = Callable[..., Found]


def layer_mesh(devices: Sequence[Any]) -> Mesh:
    """A mesh of these devices, along which layers are divided."""
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=tuple(devices))


def spread(function: Function, mesh: Mesh, stacks: Sequence[Any], others: Sequence[Any], **static: Any) -> Found:
    """`function(stacks, others)`, the layers of each stack divided among the devices of a mesh.

    Every device gets equally many; the last ones are filled up with copies of a stack's last layer.

    Args:
      function: of a module, so that its program is compiled once. It gives a pair for each stack: an array of its
        shape, and a pytree; every row of them depends on the same row of its arguments alone.
      mesh: of `layer_mesh`; all of its devices belong to this process.
      stacks: arrays with a leading layer axis, on one device, of which the memory is taken.
      others: for each stack a pytree of arrays with the same leading axis.
      **static: hashable arguments of `function`, by keyword.

    Returns:
      What `function` gives, on the device where the stacks were; the first of each pair is in the stack's memory.
    """
    program = functools.partial(spread_program, function=function, static=tuple(sorted(static.items())), mesh=mesh)
    lying = laid_out(tuple(stacks), mesh), tuple(laid_out(tree, mesh) for tree in others)
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    found = _in_turn(program, mesh, *lying) if is_cpu else program(*lying, None)
    return tuple(_gathered(jnp.asarray(stack), *pair) for stack, pair in zip(stacks, found, strict=True))


@functools.partial(Program, static_argnames=("function", "static", "mesh"), donate_argnums=0)
def spread_program(
    stacks: tuple, others: tuple, turn: Any, *, function: Function, static: tuple[tuple[str, Any], ...], mesh: Mesh
) -> Found:
    """`function` on every device of a mesh, with the layers that lie there.

    Args:
      stacks: as `laid_out`; their memory is taken.
      others: likewise.
      turn: for each device whether it is its turn; None if all work at the same time.
      function: as in `spread`.
      static: its arguments by keyword.
      mesh: of `layer_mesh`.
    """

    def on_one_device(stacks: tuple, others: tuple, turn: Any) -> Found:
        call = functools.partial(function, **dict(static))
        if turn is None:
            return call(stacks, others)
        told = jax.eval_shape(call, stacks, others)
        rest = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), x) for _, x in told]

        # A loop that is gone through once or not at all: what it carries stays where it is.
        def once(_: Any, found: Found) -> Found:
            return call(tuple(stack for stack, _ in found), others)

        return jax.lax.fori_loop(0, turn[0].astype(jnp.int32), once, tuple(zip(stacks, rest, strict=True)))

    layers = PartitionSpec(AXIS)
    on_all = jax.shard_map(on_one_device, mesh=mesh, in_specs=layers, out_specs=layers, check_vma=False)
    return on_all(stacks, others, turn)


def laid_out(tree: Any, mesh: Mesh) -> Any:
    """Arrays over the devices of a mesh, by their first axis, filled up with copies of their last row."""

    def lay(x: Any) -> jax.Array:
        rows = _share(len(x), mesh)
        pieces = [x[min(i * rows, len(x) - 1) : (i + 1) * rows] for i in range(mesh.size)]
        filled = zip((_filled(piece, rows) for piece in pieces), mesh.devices.flat, strict=True)
        # A copy also where all of it lies there already: the program takes the memory.
        return _over_mesh([jax.device_put(piece, device, may_alias=False) for piece, device in filled], mesh)

    return jax.tree.map(lay, tree)


def _share(n_layers: int, mesh: Mesh) -> int:
    """How many layers each device gets."""
    return -(-n_layers // mesh.size)


def _filled(piece: Any, n_rows: int) -> Any:
    missing = n_rows - len(piece)
    return jnp.concatenate([piece, jnp.repeat(piece[-1:], missing, axis=0)]) if missing else piece


def _over_mesh(pieces: Sequence[jax.Array], mesh: Mesh) -> jax.Array:
    """One array, of a piece on each device."""
    shape = (len(pieces) * len(pieces[0]), *pieces[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, PartitionSpec(AXIS)), list(pieces))


def _pieces(array: jax.Array) -> list[jax.Array]:
    """What lies on each device of a mesh, in its order."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return [shard.data for shard in shards]


def _in_turn(program: Callable[..., Found], mesh: Mesh, stacks: tuple, others: tuple) -> Found:
    """One device after another; those that have nothing but copies are left out."""
    told: list[list[Any]] = []  # for each device, what there is to tell of its layers
    for number in range(mesh.size):
        turn: Bool[Any, " devices"] = laid_out(jnp.arange(mesh.size) == number, mesh)
        found = run_alone(program, stacks, others, turn)
        stacks = tuple(stack for stack, _ in found)
        told.append([jax.tree.map(lambda x, i=number: _pieces(x)[i], rest) for _, rest in found])
    rests = (jax.tree.map(lambda *pieces: _over_mesh(pieces, mesh), *parts) for parts in zip(*told, strict=True))
    return tuple(zip(stacks, rests, strict=True))


def _gathered(stack: jax.Array, written: jax.Array, rest: Any) -> tuple[jax.Array, Any]:
    """What all devices have found of one stack, on the device where it lies; the first in its memory."""
    home, n_layers = next(iter(stack.devices())), len(stack)
    pieces = _pieces(written)
    for number, piece in enumerate(pieces):
        start = number * len(piece)
        if start < n_layers:
            stack = _overwritten(stack, jax.device_put(piece[: n_layers - start], home), start)

    def gather(x: jax.Array) -> jax.Array:
        return jnp.concatenate([jax.device_put(piece, home) for piece in _pieces(x)])[:n_layers]

    return stack, jax.tree.map(gather, rest)


@functools.partial(jax.jit, donate_argnums=0)
def _overwritten(
    stack: Shaped[jax.Array, "layers *shape"], rows: Shaped[jax.Array, "rows *shape"], start: int
) -> Shaped[jax.Array, "layers *shape"]:
    """A stack with some layers replaced, in its memory."""
    return jax.lax.dynamic_update_slice_in_dim(stack, rows, start, 0)
