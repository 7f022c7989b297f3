"""The safetensors format: headers checked by hand, so that every fault has a name; files streamed out.

Format: 8 bytes (little-endian length n), n bytes of JSON, then the tensors' bytes without holes.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from nufilt_jax.checkpoints.dtypes import bits, is_known
from nufilt_jax.errors import Problem

_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_RELOAD = "download or save it again"


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
    table, start, fault = _read_table(file, size)
    if fault:
        return Header((), {}, (Problem(where, fault, _RELOAD),))
    metadata = table.pop("__metadata__", None)
    metadata = metadata if isinstance(metadata, dict) else {}
    entries: list[Entry] = []
    problems: list[Problem] = []
    for name, row in table.items():
        entry = _entry(name, row, start)
        if isinstance(entry, str):
            problems.append(Problem(where, entry, _RELOAD, name))
        else:
            entries.append(entry)
    entries.sort(key=lambda entry: entry.spans)
    problems += _layout_problems(entries, start, size, where) if not problems else []
    return Header(tuple(entries), metadata, tuple(problems))


def _read_table(file: BufferedReader, size: int) -> tuple[dict[str, Any], int, str]:
    """The header's JSON, where the data starts, and what is wrong (empty if nothing)."""
    if size < 8:
        return {}, 0, f"is {size} bytes long, too short for a safetensors file"
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER:
        return {}, 0, f"is no safetensors file: it would have a header of {length} bytes"
    if 8 + length > size:
        return {}, 0, f"is cut off: the header needs {8 + length} bytes, the file has {size}"
    try:
        table = json.loads(file.read(length))
    except ValueError:  # UnicodeDecodeError is one
        return {}, 0, "has a header that is not JSON"
    if not isinstance(table, dict):
        return {}, 0, "has a header that is not a JSON object"
    return table, 8 + length, ""


def _entry(name: str, row: object, start: int) -> Entry | str:
    """One row of the header, or what is wrong with it."""
    if not isinstance(row, dict):
        return "has no description in the header"
    dtype, shape, offsets = row.get("dtype"), row.get("shape"), row.get("data_offsets")
    if not isinstance(dtype, str) or not is_known(dtype):
        return f"has the unknown element type {dtype!r}"
    if not _are_counts(shape):
        return f"has the impossible shape {shape!r}"
    if not (_are_counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        return f"has the impossible place {offsets!r} in the file"
    expected = math.prod(shape) * bits(dtype) / 8
    if offsets[1] - offsets[0] != expected:
        return f"takes {offsets[1] - offsets[0]} bytes, but {dtype} of shape {shape} needs {expected:.0f}"
    return Entry(name, dtype, tuple(shape), ((start + offsets[0], start + offsets[1]),))


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


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


def write_file(path: Path, pieces: Iterable[Piece], metadata: Mapping[str, str]) -> None:
    """Streams a safetensors file.

    The library would need all tensors in memory at once, and refuses types that it does not know.
    """
    pieces = ordered(pieces)
    with path.open("wb") as file:
        file.write(_header_bytes(pieces, metadata))
        for piece in pieces:
            file.writelines(piece.data)


def _header_bytes(pieces: list[Piece], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for piece in pieces:
        end = at + math.prod(piece.shape) * bits(piece.dtype) // 8
        table[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text + b" " * (-len(text) % 8)
    return len(padded).to_bytes(8, "little") + padded
