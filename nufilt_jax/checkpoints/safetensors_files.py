"""The safetensors format: headers checked by hand, so that every fault has a name; files streamed out.

Format: 8 bytes (little-endian length n), n bytes of JSON, then the tensors' bytes without holes.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from nufilt_jax.checkpoints.dtypes import bits, is_known
from nufilt_jax.durable import write_pieces
from nufilt_jax.errors import Problem
from nufilt_jax.strict_json import (
    LFS_POINTER,
    LFS_PULL,
    MOST_BYTES,
    POINTER_BYTES,
    JsonError,
    is_lfs_pointer,
    is_text,
    parse_object,
    shown,
)

_RELOAD = "download or save it again"
_MOST_TOLD = 1000  # faults of one header
_MAX_AXES = 32  # numpy had no more until 2.0
_TOO_LARGE = 1 << 56  # bytes of a file, or elements of an array: bytes and bits of it fit 64 bits


HEADER_MARK = "#header"  # behind a file's name: of its header alone is the hash


class Entry(NamedTuple):
    """One tensor of a file: name, type, shape and absolute byte ranges."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class Header(NamedTuple):
    """What a weight file says of itself; `problems` is not empty if it cannot be trusted."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    problems: tuple[Problem, ...]


def read_header(file: BufferedReader, where: str) -> Header:
    """Entries of a safetensors file, in the order of their bytes.

    Args:
      file: opened for reading; only the header is read.
      where: what to call the file in messages.
    """
    size = file.seek(0, 2)
    file.seek(0)
    if pointer := pointer_problem(file, where):
        return Header((), {}, (pointer,))
    table, start, fault = _read_table(file, size)
    if fault:
        return Header((), {}, (Problem(where, fault, _RELOAD),))
    metadata = _texts(table.pop("__metadata__", None))
    entries: list[Entry] = []
    problems: list[Problem] = []
    for number, (name, row) in enumerate(table.items()):
        entry = _entry(name, row, start)
        if not isinstance(entry, str):
            entries.append(entry)
        elif len(problems) < _MOST_TOLD:
            problems.append(Problem(where, entry, _RELOAD, name))
        else:
            more = f"has damage in more than {_MOST_TOLD} tensors; {len(table) - number} were not looked into"
            problems.append(Problem(where, more, _RELOAD))
            break
    entries.sort(key=lambda entry: entry.spans)  # the header may list them in any order
    problems += _layout_problems(entries, start, size, where) if not problems else []
    return Header(tuple(entries), metadata, tuple(problems))


def header_sha256(path: Path) -> str:
    """Hex digest of a file's header: of names, shapes and types, and of no number."""
    with path.open("rb") as file:
        start = file.read(8)
        # The length is sound: opening the checkpoint has held it against the file.
        return hashlib.sha256(start + file.read(int.from_bytes(start, "little"))).hexdigest()


def pointer_problem(file: BufferedReader, where: str) -> Problem | None:
    """Says that git-lfs never fetched a file; None if it did. Leaves the file at its start."""
    start = file.read(POINTER_BYTES)
    file.seek(0)
    return Problem(where, LFS_POINTER, LFS_PULL) if is_lfs_pointer(start) else None


def _read_table(file: BufferedReader, size: int) -> tuple[dict[str, Any], int, str]:
    """The header's JSON, where the data starts, and what is wrong (empty if nothing)."""
    if size < 8:
        return {}, 0, f"is {size} bytes long, too short for a safetensors file"
    length = int.from_bytes(file.read(8), "little")
    if length > MOST_BYTES:
        return {}, 0, f"is no safetensors file: it would have a header of {length} bytes"
    if 8 + length > size:
        return {}, 0, f"is cut off: the header needs {8 + length} bytes, the file has {size}"
    try:
        return parse_object(file.read(length)), 8 + length, ""
    except JsonError as error:
        return {}, 0, f"has a header that {error}"


def _texts(metadata: object) -> dict[str, str]:
    """What the format allows of metadata: texts by name."""
    rows = metadata.items() if isinstance(metadata, dict) else ()
    return {key: text for key, text in rows if isinstance(text, str) and is_text(key) and is_text(text)}


def _entry(name: str, row: object, start: int) -> Entry | str:
    """One row of the header, or what is wrong with it."""
    if not is_text(name):
        return "has a name that is no text"
    if not isinstance(row, dict):
        return "has no description in the header"
    dtype, shape, offsets = row.get("dtype"), row.get("shape"), row.get("data_offsets")
    if not isinstance(dtype, str) or not is_known(dtype):
        return f"has the unknown element type {shown(dtype)}"
    if not _are_counts(shape) or not is_possible_shape(shape):
        return f"has the impossible shape {shown(shape)}"
    if not (_are_counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        return f"has the impossible place {shown(offsets)} in the file"
    taken, needed = offsets[1] - offsets[0], math.prod(shape) * bits(dtype)
    if taken * 8 != needed:  # in bits: packed types have elements of less than a byte
        return f"takes {taken} bytes, but {dtype} of shape {shape} needs {needed / 8:.0f}"
    return Entry(name, dtype, tuple(shape), ((start + offsets[0], start + offsets[1]),))


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _TOO_LARGE for item in value)


def is_possible_shape(shape: Sequence[int]) -> bool:
    """Whether an array can have this shape: numpy's limits, which also hold where one of its sides is 0."""
    if len(shape) > _MAX_AXES or any(size < 0 for size in shape):
        return False
    return math.prod(size for size in shape if size) < _TOO_LARGE


def _layout_problems(entries: list[Entry], start: int, size: int, where: str) -> Iterator[Problem]:
    """Holes, overlaps and missing bytes; `entries` are sorted by place."""
    at = start
    for entry in entries:
        begin, end = entry.spans[0]
        if begin != at:
            fault = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
            yield Problem(where, f"{fault}: it starts at byte {begin}, not {at}", _RELOAD, entry.name)
        if end > size:
            what = f"is cut off: it ends at byte {end}, but the file has {size}"
            yield Problem(where, what, _RELOAD, entry.name)
            return
        at = end
    if at < size:
        yield Problem(where, f"has {size - at} bytes after its last tensor", _RELOAD)


class Piece(NamedTuple):
    """A tensor to write: its bytes come when asked for, so that one at a time is in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Iterable[bytes | memoryview]


def ordered(pieces: Iterable[Piece]) -> list[Piece]:
    """Wide element types first, as the safetensors library writes them, so that each is aligned."""
    return sorted(pieces, key=lambda piece: -bits(piece.dtype))


def file_bytes(pieces: Iterable[Piece], metadata: Mapping[str, str]) -> int:
    """Bytes of the file that `write_file` writes."""
    pieces = list(pieces)
    data = sum(math.prod(piece.shape) * bits(piece.dtype) // 8 for piece in pieces)
    return len(_header_bytes(ordered(pieces), metadata)) + data


def write_file(path: Path, pieces: Iterable[Piece], metadata: Mapping[str, str], *, mode: str = "wb") -> None:
    """Streams a safetensors file.

    The library would need all tensors in memory at once, and refuses types that it does not know.

    Args:
      path: of the file.
      pieces: its tensors.
      metadata: of its header.
      mode: `wb`, or `r+b` to write over room that was taken before.
    """
    pieces = ordered(pieces)
    with path.open(mode) as file:
        file.write(_header_bytes(pieces, metadata))
        write_pieces(file, itertools.chain.from_iterable(piece.data for piece in pieces))


def _header_bytes(pieces: list[Piece], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for piece in pieces:
        end = at + math.prod(piece.shape) * bits(piece.dtype) // 8
        table[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text + b" " * (-len(text) % 8)  # so that the first tensor is aligned
    return len(padded).to_bytes(8, "little") + padded
