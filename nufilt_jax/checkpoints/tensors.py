"""One stored tensor: where its bytes lie, and what they mean."""

import dataclasses
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from nufilt_jax.checkpoints.dtypes import NumpyArray, numpy_dtype
from nufilt_jax.checkpoints.maps import drop_pages, map_file

Bytes = UInt8[np.ndarray, " bytes"]
CHUNK = 1 << 24  # bytes per piece when streaming: 16 MiB keeps memory flat and disks busy


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor of a weight file, known from the header alone.

    Attributes:
      name: canonical name; equal in all files that hold this tensor.
      stored_name: the name as it stands in the file; a path joined by `/` in Flax files.
      file: the weight file.
      shape: in canonical orientation: linear weights `[d_out, d_in]`, convolutions `[out, in, kh, kw]`.
      dtype: element type as safetensors spells it, as in `F32` or `BF16`.
      stored_shape: shape as it stands in the file.
      axes: permutation from the stored to the canonical orientation.
      spans: byte ranges `(start, stop)` in the file, one unless Flax split the array in chunks.
      aliases: further copies of this tensor in the checkpoint, tied to it in the model.
    """

    name: str
    stored_name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    stored_shape: tuple[int, ...]
    axes: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    aliases: tuple["TensorInfo", ...] = ()

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(stop - start for start, stop in self.spans)

    def part(self, index: int) -> "TensorInfo":
        """Matrix number `index` of a stack of them, which lies in one piece in the file."""
        n_bytes, [(start, _)] = self.nbytes // self.stored_shape[0], self.spans
        return dataclasses.replace(
            self,
            shape=self.shape[1:],
            stored_shape=self.stored_shape[1:],
            axes=tuple(axis - 1 for axis in self.axes[1:]),
            spans=((start + index * n_bytes, start + (index + 1) * n_bytes),),
            aliases=(),
        )

    @property
    def copies(self) -> tuple["TensorInfo", ...]:
        """The tensor and its aliases: everything to write when its value changes."""
        return (self, *self.aliases)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldTensor(TensorInfo):
    """A tensor that lies in no file, but in memory.

    Attributes:
      value: its numbers, in canonical orientation.
    """

    value: Any = dataclasses.field(compare=False, repr=False)


def stream_bytes(info: TensorInfo, chunk: int = CHUNK, *, stop: threading.Event | None = None) -> Iterator[bytes]:
    """The tensor's bytes in file order, in pieces; read, not mapped, so that memory stays flat.

    Args:
      info: which tensor.
      chunk: the longest piece.
      stop: once it is set, reading ends with `CancelledError` before the next piece.
    """
    if not isinstance(info, HeldTensor):
        yield from stream_spans(info.file, info.spans, chunk, stop=stop)
        return
    held = np.ascontiguousarray(info.value).reshape(-1).view(np.uint8)
    yield from (held[start : start + chunk].tobytes() for start in range(0, held.size, chunk))


def stream_spans(
    path: Path, spans: Iterable[tuple[int, int]], chunk: int = CHUNK, *, stop: threading.Event | None = None
) -> Iterator[bytes]:
    """The bytes of some ranges `(start, end)` of a file; see `stream_bytes`."""
    with path.open("rb") as file:
        for start, end in spans:
            file.seek(start)
            for at in range(start, end, chunk):
                if stop is not None and stop.is_set():
                    raise CancelledError
                piece = file.read(min(chunk, end - at))
                if len(piece) < min(chunk, end - at):
                    raise OSError(f"{path} became shorter while it was read")
                yield piece


class UnreadTensors(Mapping[str, Any]):  # not of arrays: a type checker at run time would read one
    """Tensors by canonical name, each read when it is asked for and not kept: neither here nor as mapped pages."""

    def __init__(self, infos: Mapping[str, TensorInfo], stop: threading.Event | None = None) -> None:
        self._infos, self._stop = infos, stop

    def __getitem__(self, name: str) -> NumpyArray:
        return self._read(self._infos[name])

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def part(self, name: str, index: int) -> NumpyArray:
        """Matrix number `index` of a stack of them, read alone."""
        info = self._infos[name]
        can_split = len(info.spans) == 1 and info.axes[0] == 0  # else no matrix lies in one piece
        return self._read(info.part(index)) if can_split else self[name][index]

    def _read(self, info: TensorInfo) -> NumpyArray:
        if isinstance(info, HeldTensor):
            return np.asarray(info.value)
        stored = b"".join(stream_bytes(info, stop=self._stop))
        return _as_array(np.frombuffer(stored, np.uint8), info)

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


class PassingTensors(Mapping[str, Any]):
    """Mapped tensors by name; when one is asked for, the pages of the one before leave this process's memory.

    They stay in the system's page cache, or are read again when they are wanted.
    """

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors, self._last = tensors, None

    def __getitem__(self, name: str) -> Any:
        drop_pages(self._last)
        self._last = self._tensors[name]
        return self._last

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def map_tensors(infos: Iterable[TensorInfo]) -> dict[str, NumpyArray]:
    """Arrays by canonical name: read-only views of memory-mapped files, in canonical orientation.

    The maps live as long as the arrays do, so what a caller drops is unmapped.
    """
    maps: dict[Path, Bytes] = {}
    return {info.name: _view(info, maps) for info in infos}


def _view(info: TensorInfo, maps: dict[Path, Bytes]) -> NumpyArray:
    if isinstance(info, HeldTensor):
        return np.asarray(info.value)
    if info.file not in maps:
        maps[info.file] = map_file(info.file)
    parts = [maps[info.file][start:stop] for start, stop in info.spans]
    return _as_array(parts[0] if len(parts) == 1 else np.concatenate(parts), info)


def _as_array(stored: Bytes, info: TensorInfo) -> NumpyArray:
    dtype = numpy_dtype(info.dtype)
    if dtype is None:
        raise TypeError(f"{info.stored_name}: {info.dtype} has no numpy type")
    # Flax files align nothing, and some devices cannot take arrays off their natural boundary.
    aligned = stored if stored.ctypes.data % dtype.alignment == 0 else stored.copy()
    return aligned.view(dtype).reshape(info.stored_shape).transpose(info.axes)
