"""What each weight file of an output will hold, and the bytes of it."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from nufilt_jax.checkpoints.dtypes import (
    FLOATS,
    INTEGERS,
    AnyArray,
    NumpyArray,
    bits,
    cast,
    is_exact,
    numpy_dtype,
    overflows,
)
from nufilt_jax.checkpoints.folders import FLAX, single_file
from nufilt_jax.checkpoints.names import flax_axes, to_flax_name
from nufilt_jax.checkpoints.reader import Checkpoint
from nufilt_jax.checkpoints.tensors import TensorInfo, map_tensors, stream_bytes
from nufilt_jax.errors import CheckpointError, Problem

_CHUNK = 1 << 22  # elements cast and checked at once


@runtime_checkable
class MadeInParts(Protocol):
    """A tensor that may be made in the type to be written, some rows at a time."""

    def in_parts(self, dtype: np.dtype) -> Iterator[tuple[NumpyArray, bool]] | None:
        """The parts, and whether a finite number of each became infinite; None where it is to be made as a whole."""
        ...


@dataclasses.dataclass(frozen=True)
class OutputTensor:
    """A tensor to write.

    Attributes:
      info: the base's tensor, copied if there is no new value.
      main: canonical name under which a new value is found; of an alias, that of the tensor it is tied to.
      name: the name to write.
      dtype: the element type to write.
      axes: permutation from the written to the canonical orientation.
    """

    info: TensorInfo
    main: str
    name: str
    dtype: str
    axes: tuple[int, ...]

    @property
    def to_stored(self) -> tuple[int, ...]:
        """Permutation from the canonical to the written orientation."""
        return tuple(int(axis) for axis in np.argsort(self.axes))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as written."""
        return tuple(self.info.shape[axis] for axis in self.to_stored)

    @property
    def nbytes(self) -> int:
        """Bytes as written."""
        return math.prod(self.shape) * bits(self.dtype) // 8


def plan_shards(like: Checkpoint, kind: str, dtype: str | None) -> dict[str, list[OutputTensor]]:
    """Tensors of each weight file: as in `like`, or all in one file if the format changes.

    Args:
      like: the base.
      kind: format to write.
      dtype: element type of all floating tensors; None keeps each tensor's own.
    """
    copies = [(info.name, copy) for info in like.tensors.values() for copy in info.copies]
    if kind != like.format:
        return {single_file(kind): _converted(like, kind, dtype)}
    shards: dict[str, list[OutputTensor]] = {path.relative_to(like.path).as_posix(): [] for path in like.weight_files}
    # As they lie in the base's files: an output stands as its base does.
    for main, info in sorted(copies, key=lambda row: row[1].spans):
        target = OutputTensor(info, main, info.stored_name, _new_dtype(info, dtype), info.axes)
        shards[info.file.relative_to(like.path).as_posix()].append(target)
    return shards


def _new_dtype(info: TensorInfo, dtype: str | None) -> str:
    return dtype if dtype is not None and info.dtype in FLOATS else info.dtype


def _converted(like: Checkpoint, kind: str, dtype: str | None) -> list[OutputTensor]:
    """Targets in the other format; Flax models have neither integer buffers nor copies of tied tensors."""
    targets = []
    for name, info in sorted(like.tensors.items()):
        rank = len(info.shape)
        if kind != FLAX:
            targets.append(OutputTensor(info, name, name, _new_dtype(info, dtype), tuple(range(rank))))
        elif info.dtype in FLOATS:
            path = to_flax_name(name, rank, like.config)
            targets.append(OutputTensor(info, name, path, _new_dtype(info, dtype), flax_axes(path, rank)))
        elif info.dtype not in INTEGERS:
            what = f"holds {info.dtype}, which Flax files cannot"
            raise CheckpointError(Problem(str(info.file), what, "use --format safetensors", info.stored_name))
    return targets


def stored_bytes(target: OutputTensor, value: AnyArray | None, lost: list[Problem]) -> Iterator[bytes | memoryview]:
    """The bytes to write, in pieces: the base's own where nothing changes.

    Args:
      target: what to write.
      value: new value in canonical orientation, or None.
      lost: gets a problem if a number is out of the range of the written type.
    """
    info = target.info
    if value is None and (target.dtype, target.axes) == (info.dtype, info.axes):
        yield from stream_bytes(info)
        return
    dtype = numpy_dtype(target.dtype)
    if dtype is None:
        raise TypeError(f"{target.name}: nothing can be cast to {target.dtype}")
    is_lost = False
    for rounded, is_part_lost in _rounded(target, value, dtype):
        is_lost |= is_part_lost
        yield rounded.reshape(-1).view(np.uint8).data
    if is_lost:
        lost.append(range_problem(info, target.dtype, target.name))


def _rounded(target: OutputTensor, value: AnyArray | None, dtype: np.dtype) -> Iterator[tuple[NumpyArray, bool]]:
    """The numbers to write, in their type and order, in parts; and of each, whether it has lost any."""
    # Parts are rows as they are canonical: of a turned matrix they would be columns.
    if isinstance(value, MadeInParts) and target.to_stored == tuple(range(len(target.shape))):
        parts = value.in_parts(dtype)
        if parts is not None:
            yield from parts
            return
    info = target.info
    canonical = map_tensors([info])[info.name] if value is None else np.asarray(value)
    flat = np.ascontiguousarray(canonical.transpose(target.to_stored)).reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        piece: NumpyArray = flat[start : start + _CHUNK]
        rounded = cast(piece, dtype)
        yield rounded, overflows(piece, rounded) if target.dtype in FLOATS else not is_exact(piece, rounded)


def range_problem(info: TensorInfo, dtype: str, name: str) -> Problem:
    """Says that a tensor, called `name` where it is written, does not fit its new type."""
    what = f"has numbers out of the range of {numpy_dtype(dtype)}"
    return Problem(str(info.file), what, "write a wider --dtype", name)


def new_types(like: Checkpoint, dtype: str | None) -> dict[str, str]:
    """The floating tensors, by canonical name, whose element type writing changes, and the type they get."""
    types = {name: _new_dtype(info, dtype) for name, info in like.tensors.items()}
    return {name: new for name, new in types.items() if new != like.tensors[name].dtype}
