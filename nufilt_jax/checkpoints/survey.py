"""What only reading the weights can tell, all of it found in one pass over a file that leaves memory flat."""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nufilt_jax.checkpoints.dtypes import FLOATS, NumpyArray, cast, numpy_dtype, overflows
from nufilt_jax.checkpoints.tensors import TensorInfo, map_tensors, stream_spans

_BLOCK = 1 << 16  # numbers compared at once: few enough for the processor's cache
# A 16-bit number is not finite exactly if all its exponent bits are set: quicker than widening it.
_EXPONENT = {"F16": np.uint16(0x7C00), "BF16": np.uint16(0x7F80)}


class Findings(NamedTuple):
    """Of one weight file; tensors by canonical name.

    Attributes:
      sha256: hex digest of the whole file.
      nonfinite: tensors with NaN or infinity. Integers are finite; packed types, which numpy cannot hold, are not
        looked into.
      out_of_range: tensors with finite numbers that their new type cannot hold.
      changes: Σ (θ_t − θ0)² of each floating tensor that the base has too, in the same shape; NaN if either has one.
    """

    sha256: str
    nonfinite: frozenset[str]
    out_of_range: frozenset[str]
    changes: dict[str, float]


class _Segment(NamedTuple):
    """A stretch of a file: of a tensor from its number `first` on, or of none."""

    start: int
    end: int
    info: TensorInfo | None = None
    first: int = 0


def survey_file(
    path: Path,
    tensors: Iterable[TensorInfo],
    *,
    base: Mapping[str, TensorInfo] | None = None,
    new_types: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
) -> Findings:
    """Reads a weight file once.

    Args:
      path: the file.
      tensors: those that lie in it and are to be looked into.
      base: the base's tensors, to compare with; mapped one at a time.
      new_types: the type that some tensors will be written in.
      stop: once it is set, reading ends with `CancelledError`.
    """
    base, new_types, digest = base or {}, new_types or {}, hashlib.sha256()
    segments = _segments(path, tensors)
    # With all that lies between tensors: the hash is of the whole file.
    pieces = stream_spans(path, [(segment.start, segment.end) for segment in segments], stop=stop)
    nonfinite, out_of_range, changes = set[str](), set[str](), dict[str, float]()
    for start, end, info, first in segments:
        dtype = None if info is None else numpy_dtype(info.dtype)
        ours = None if info is None else _partner(base, info)
        if info is not None and ours is not None:
            changes.setdefault(info.name, 0.0)
        while start < end:
            piece = next(pieces)
            digest.update(piece)
            start += len(piece)
            if info is None or dtype is None or info.dtype not in FLOATS | {"C64"}:
                continue
            numbers = np.frombuffer(piece, dtype)
            if not _all_finite(numbers, info.dtype):
                nonfinite.add(info.name)
            if info.name in new_types and _loses(numbers, new_types[info.name]):
                out_of_range.add(info.name)
            if ours is not None:
                changes[info.name] += squared_change(numbers, ours[first : first + numbers.size])
            first += numbers.size
    return Findings(digest.hexdigest(), frozenset(nonfinite), frozenset(out_of_range), changes)


def _segments(path: Path, tensors: Iterable[TensorInfo]) -> list[_Segment]:
    """The whole file in order: tensors, and what lies between them."""
    rows: list[_Segment] = []
    for info in tensors:
        dtype, first = numpy_dtype(info.dtype), 0
        for start, end in info.spans:
            rows.append(_Segment(start, end, info, first))
            first += 0 if dtype is None else (end - start) // dtype.itemsize
    found, at = list[_Segment](), 0
    for row in sorted(rows, key=lambda row: row[:2]):
        found += [_Segment(at, row.start), row]
        at = row.end
    return [*found, _Segment(at, path.stat().st_size)]


def _partner(base: Mapping[str, TensorInfo], info: TensorInfo) -> NumpyArray | None:
    """The base's numbers in the order in which a tensor's are stored; None if the two cannot be compared."""
    ours = base.get(info.name)
    if ours is None or ours.shape != info.shape or not {ours.dtype, info.dtype} <= FLOATS:
        return None
    canonical = map_tensors([ours])[ours.name]
    return canonical.transpose(np.argsort(info.axes)).reshape(-1)  # a view, unless the two are stored in other ways


def squared_change(theirs: NumpyArray, ours: NumpyArray) -> float:
    """Σ (a − b)² of two vectors of any floating types, summed in float64.

    Differences are taken in float32, as a merge takes them, unless there is more to lose.
    """
    wide = np.float64 if np.dtype(np.float64) in (theirs.dtype, ours.dtype) else np.float32
    total = 0.0
    for start in range(0, theirs.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        with np.errstate(over="ignore", invalid="ignore"):
            difference = (theirs[block].astype(wide) - ours[block].astype(wide)).astype(np.float64)
            total += float(np.einsum("i,i->", difference, difference))  # no BLAS: its threads would get in the way
    return total


def _loses(numbers: NumpyArray, code: str) -> bool:
    dtype = numpy_dtype(code)
    blocks: Iterator[NumpyArray] = (numbers[start : start + _BLOCK] for start in range(0, numbers.size, _BLOCK))
    return dtype is not None and any(overflows(block, cast(block, dtype)) for block in blocks)


def _all_finite(numbers: NumpyArray, code: str) -> bool:
    if mask := _EXPONENT.get(code):
        return not ((numbers.view(np.uint16) & mask) == mask).any()
    # A finite sum proves all terms finite; an infinite one may have overflowed, so look at each.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(numbers.sum())) or bool(np.isfinite(numbers).all())
