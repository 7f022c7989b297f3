"""Named groups of arrays in one safetensors file: exact in size, written in this thread, checked when they are read.

A tensor is called `GROUP:NAME`; the file's metadata holds the CRC-32 of each, so that no flipped bit feeds a merge.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from nufilt_jax.checkpoints import safetensors_files
from nufilt_jax.checkpoints.dtypes import AnyArray, NumpyArray, code_of, numpy_dtype
from nufilt_jax.checkpoints.safetensors_files import Entry, Header, Piece
from nufilt_jax.checkpoints.tensors import CHUNK, stream_spans

Groups = Mapping[str, Mapping[str, AnyArray]]  # named groups of arrays, as `delta` and `extra` of a merge

_SUMS = "crc32"
_SEPARATOR = ":"  # no group has one in its name


class DamagedError(ValueError):
    """A file of arrays is not as it was written; says in which way."""


def write_arrays(path: Path, groups: Groups) -> None:
    """Writes a new file, whose whole room is taken before the first byte is written.

    Args:
      path: there is no such file yet.
      groups: arrays of any type that safetensors knows.

    Raises:
      OSError: there is no room, or the file cannot be written.
    """
    arrays = {
        f"{group}{_SEPARATOR}{name}": np.asarray(x) for group, named in groups.items() for name, x in named.items()
    }
    sums = {name: _sum(_pieces(x)) for name, x in arrays.items()}  # a pass of its own: the header comes first
    pieces = [Piece(name, _code(x), x.shape, _pieces(x)) for name, x in arrays.items()]
    metadata = {_SUMS: json.dumps(sums)}
    with path.open("xb") as file:
        if hasattr(os, "posix_fallocate"):  # quotas too are met before any work
            os.posix_fallocate(file.fileno(), 0, safetensors_files.file_bytes(pieces, metadata))
    safetensors_files.write_file(path, pieces, metadata, mode="r+b")


class ArrayFile:
    """A file that `write_arrays` has written. Its header is read at once, and each array when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Args:
          path: the file.

        Raises:
          DamagedError: it is not as it was written.
          OSError: it cannot be read.
        """
        self._path = path
        with path.open("rb") as file:
            header = safetensors_files.read_header(file, str(path))
        for problem in header.problems:
            raise DamagedError(": ".join(filter(None, (problem.tensor, problem.what))))
        self._entries = {entry.name: entry for entry in header.entries}
        self._sums = _sums_in(header)

    @property
    def names(self) -> dict[str, list[str]]:
        """The names of each group, of those that have any."""
        found: dict[str, list[str]] = {}
        for key in self._entries:
            group, _, name = key.partition(_SEPARATOR)
            found.setdefault(group, []).append(name)
        return found

    def read(self, group: str, names: Iterable[str]) -> dict[str, NumpyArray]:
        """Some arrays of a group.

        Raises:
          DamagedError: one is missing, or is not as it was written.
          OSError: the file cannot be read.
        """
        return {name: self._array(f"{group}{_SEPARATOR}{name}") for name in names}

    def _array(self, key: str) -> NumpyArray:
        entry = self._entries.get(key)
        if entry is None:
            raise DamagedError(f"{key} is not in {self._path.name}")
        # The header was held against the file's size: it asks for no more room than the file has.
        stored = np.empty(sum(stop - start for start, stop in entry.spans), np.uint8)
        at = 0
        for piece in stream_spans(self._path, entry.spans):
            stored[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
            at += len(piece)
        if _sum([stored.data]) != self._sums.get(key):
            raise DamagedError(f"{key} has another checksum in {self._path.name} than when it was written")
        return stored.view(_dtype(entry)).reshape(entry.shape)


def _sums_in(header: Header) -> dict[str, int]:
    try:
        return dict(json.loads(header.metadata[_SUMS]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamagedError(f"has no checksums: {error!r}") from error


def _pieces(array: NumpyArray) -> Iterator[memoryview]:
    """The bytes of an array, some at a time."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for at in range(0, flat.size, CHUNK):
        yield flat[at : at + CHUNK].data


def _sum(pieces: Iterable[memoryview]) -> int:
    found = 0
    for piece in pieces:
        found = zlib.crc32(piece, found)
    return found


def _code(array: NumpyArray) -> str:
    code = code_of(array.dtype.name)
    if code is None:
        raise TypeError(f"safetensors has no name for {array.dtype}")
    return code


def _dtype(entry: Entry) -> np.dtype:
    dtype = numpy_dtype(entry.dtype)
    if dtype is None:
        raise DamagedError(f"{entry.name} has the element type {entry.dtype}, which no state has")
    return dtype
