"""Flax's msgpack files: walked by hand, so that shapes are known without reading, or copying, one weight.

Only what `flax.serialization` writes is understood: maps with string keys, and arrays as extension type 1
or 3 holding `(shape, dtype, bytes)`. Nothing in such a file can run code.
"""

import math
import re
from collections.abc import Iterable
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

from nufilt_jax.checkpoints.dtypes import bits, code_of, numpy_dtype
from nufilt_jax.checkpoints.safetensors_files import Entry, Header, Piece, is_possible_shape, pointer_problem
from nufilt_jax.errors import Problem
from nufilt_jax.strict_json import shown

_ARRAY, _SCALAR = 1, 3  # extension types of flax.serialization; 2 is a complex number
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK_BYTES = 1 << 30  # msgpack objects end at 2^32 bytes; flax splits arrays here
_MAX_DEPTH = 64
_MOST_TENSORS = 250_000  # twice those of the largest models
_CHUNK_NUMBER = re.compile(r"[0-9]{1,9}")

# First byte of an object -> (kind, how many bytes hold its length).
_SIZED = {
    0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4),
    0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4),
    0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4),
    0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
_INTS = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_FIRST_SIGNED = 0xD0  # of these; some writers give every length as a signed number of 64 bits


class _Malformed(ValueError):
    """The file is not what flax writes; says in which way, and at which tensor if at one."""

    def __init__(self, what: str, tensor: str = "") -> None:
        super().__init__(what)
        self.tensor = tensor


def read_header(file: BufferedReader, where: str) -> Header:
    """Entries of a Flax file, in its own order; names are paths joined by `/`.

    Args:
      file: opened for reading; weights are skipped, not read.
      where: what to call the file in messages.
    """
    size = file.seek(0, 2)
    file.seek(0)
    if pointer := pointer_problem(file, where):
        return Header((), {}, (pointer,))
    entries: list[Entry] = []
    try:
        _walk(file, size, (), entries)
        if file.tell() != size:
            raise _Malformed(f"has {size - file.tell()} bytes after its last tensor")
        _require_tree([entry.name for entry in entries])
    except _Malformed as error:
        return Header((), {}, (Problem(where, str(error), "download or save it again", error.tensor),))
    return Header(tuple(entries), {}, ())


def _require_tree(names: list[str]) -> None:
    """Refuses names that two tensors have, or a tensor and a map of tensors, as slashes in keys can bring about."""
    known = set(names)
    if len(known) < len(names):
        raise _Malformed("holds two tensors of one name")
    for name in names:
        at = name.find("/")
        while at >= 0:
            if name[:at] in known:
                raise _Malformed("is an array and a map of arrays", name[:at])
            at = name.find("/", at + 1)


def _walk(file: BufferedReader, size: int, path: tuple[str, ...], entries: list[Entry]) -> None:
    """Appends the tensors of one object: a map, or an array."""
    name = "/".join(path)
    kind, length = _head(file, size)
    if len(entries) >= _MOST_TENSORS:
        raise _Malformed(f"holds more than {_MOST_TENSORS} tensors")
    if kind == "ext":
        entries.append(_read_array(file, name, length, size))
    elif kind != "map":
        raise _Malformed(f"is a msgpack {kind}, not an array or a map of arrays", name)
    elif len(path) > _MAX_DEPTH:
        raise _Malformed("is nested too deeply", name)
    else:
        keys_before = len(entries)
        for _ in range(length):
            key = _text(file, size)
            if key == _CHUNKED:
                _skip_true(file, size)
                entries[keys_before:] = [_read_chunked(file, size, path, length - 1)]
                return
            _walk(file, size, (*path, key), entries)


def _head(file: BufferedReader, size: int) -> tuple[str, int]:
    """Kind of the next object and its length: in items for maps and arrays, the value for integers."""
    first = _take(file, 1, size)[0]
    if first <= 0x7F:
        return "int", first
    if first <= 0x8F:
        return "map", first & 0x0F
    if first <= 0x9F:
        return "array", first & 0x0F
    if first <= 0xBF:
        return "str", first & 0x1F
    if 0xD4 <= first <= 0xD8:
        return "ext", 1 << (first - 0xD4)
    if first in _INTS:
        return "int", int.from_bytes(_take(file, _INTS[first], size), "big", signed=first >= _FIRST_SIGNED)
    if first >= 0xE0:
        return "int", first - 0x100
    if first in _SIZED:
        kind, width = _SIZED[first]
        return kind, int.from_bytes(_take(file, width, size), "big")
    return {0xC0: "nil", 0xC2: "bool", 0xC3: "bool"}.get(first, "number"), 0


def _take(file: BufferedReader, count: int, size: int) -> bytes:
    if file.tell() + count > size:
        raise _Malformed(f"is cut off: byte {file.tell() + count} is needed, the file has {size}")
    return file.read(count)


def _text(file: BufferedReader, size: int) -> str:
    kind, length = _head(file, size)
    if kind not in ("str", "bin"):  # dtype names are `bin` in old files
        raise _Malformed(f"has a msgpack {kind} where a name belongs")
    try:
        return _take(file, length, size).decode()
    except UnicodeDecodeError:
        raise _Malformed("has a name that is not UTF-8") from None


def _integers(file: BufferedReader, size: int, kinds: tuple[str, ...]) -> list[int]:
    """A shape: a msgpack array, or (in chunked arrays) a map from index to length."""
    kind, length = _head(file, size)
    if kind not in kinds:
        raise _Malformed(f"has a msgpack {kind} where a shape belongs")
    if length > size:  # before a loop of that length
        raise _Malformed(f"is cut off: a shape has {length} numbers, the file {size} bytes")
    values = []
    for _ in range(length):
        if kind == "map":
            _text(file, size)
        item, value = _head(file, size)
        if item != "int":
            raise _Malformed(f"has a msgpack {item} in a shape")
        values.append(value)
    return values


def _read_array(file: BufferedReader, name: str, length: int, size: int) -> Entry:
    """An array's description; leaves the file behind its bytes."""
    code = _take(file, 1, size)[0]
    end = file.tell() + length
    if code not in (_ARRAY, _SCALAR):
        raise _Malformed(f"is an object of type {code} that is no array", name)
    if _head(file, size) != ("array", 3):
        raise _Malformed("is not described as an array", name)
    shape = _integers(file, size, ("array",))
    dtype_name = _text(file, size)
    kind, count = _head(file, size)
    start = file.tell()
    if end > size:
        raise _Malformed(f"is cut off: it ends at byte {end}, but the file has {size}", name)
    dtype = code_of(dtype_name)
    if dtype is None:
        raise _Malformed(f"has the unknown element type {shown(dtype_name)}", name)
    if not is_possible_shape(shape):
        raise _Malformed(f"has the impossible shape {shown(shape)}", name)
    if kind != "bin" or start + count != end or count * 8 != math.prod(shape) * bits(dtype):
        raise _Malformed(f"takes {end - start} bytes, which {dtype_name} of shape {shape} does not", name)
    file.seek(end)
    return Entry(name, dtype, tuple(shape), ((start, end),))


def _skip_true(file: BufferedReader, size: int) -> None:
    if _head(file, size)[0] != "bool":
        raise _Malformed("has a chunked array without its mark")


def _read_chunked(file: BufferedReader, size: int, path: tuple[str, ...], n_keys: int) -> Entry:
    """An array above 1 GiB: `shape` and `chunks`, both maps from index to value."""
    name = "/".join(path)
    shape: list[int] = []
    chunks: list[Entry] = []
    for _ in range(n_keys):
        key = _text(file, size)
        if key == "shape":
            shape = _integers(file, size, ("map", "array"))
        elif key == "chunks":
            _walk(file, size, (*path, key), chunks)
            if not all(_CHUNK_NUMBER.fullmatch(chunk.name.rsplit("/", 1)[-1]) for chunk in chunks):
                raise _Malformed("has chunks without numbers", name)
        else:
            raise _Malformed(f"has the unknown part {shown(key)}", name)
    chunks.sort(key=lambda chunk: int(chunk.name.rsplit("/", 1)[-1]))  # as numbers: as text, 10 comes before 2
    dtypes = {chunk.dtype for chunk in chunks}
    if not is_possible_shape(shape):
        raise _Malformed(f"has the impossible shape {shown(shape)}", name)
    if len(dtypes) != 1 or sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
        raise _Malformed(f"has chunks that do not add up to its shape {shape}", name)
    return Entry(name, dtypes.pop(), tuple(shape), tuple(span for chunk in chunks for span in chunk.spans))


def write_file(path: Path, pieces: Iterable[Piece]) -> None:
    """Streams a file that `flax.serialization.msgpack_restore` reads; names are paths joined by `/`."""
    import msgpack

    tree: dict[str, Any] = {}
    for piece in pieces:
        *modules, leaf = piece.name.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = piece
    with path.open("wb") as file:
        _write_node(file, msgpack.Packer(use_bin_type=True), tree)


def _write_node(file: BufferedWriter, packer: Any, node: Any) -> None:
    if isinstance(node, Piece):
        _write_array(file, packer, node)
        return
    file.write(packer.pack_map_header(len(node)))
    for key, child in node.items():
        file.write(packer.pack(key))
        _write_node(file, packer, child)


def _write_array(file: BufferedWriter, packer: Any, piece: Piece) -> None:
    dtype = numpy_dtype(piece.dtype)
    if dtype is None:
        raise TypeError(f"{piece.name}: flax has no name for {piece.dtype}")
    data = b"".join(piece.data)
    if len(data) <= _CHUNK_BYTES:
        file.write(packer.pack_ext_type(_ARRAY, packer.pack((piece.shape, dtype.name, data))))
        return
    step = _CHUNK_BYTES // dtype.itemsize * dtype.itemsize  # no number is cut in two
    parts = [data[at : at + step] for at in range(0, len(data), step)]
    file.write(packer.pack_map_header(3) + packer.pack(_CHUNKED) + packer.pack(True))
    file.write(packer.pack("shape") + packer.pack({str(i): n for i, n in enumerate(piece.shape)}))
    file.write(packer.pack("chunks") + packer.pack_map_header(len(parts)))
    for index, part in enumerate(parts):
        row = (len(part) // dtype.itemsize,), dtype.name, part
        file.write(packer.pack(str(index)) + packer.pack_ext_type(_ARRAY, packer.pack(row)))
