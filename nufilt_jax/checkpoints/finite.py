"""Finding NaN and infinity in files, without holding them in memory."""

import threading
from collections.abc import Iterable

import numpy as np

from nufilt_jax.checkpoints.dtypes import INTEGERS, Array, numpy_dtype
from nufilt_jax.checkpoints.reader import Checkpoint
from nufilt_jax.checkpoints.tensors import TensorInfo, stream_bytes

# A 16-bit number is not finite exactly if all its exponent bits are set: quicker than widening it.
_EXPONENT = {"F16": np.uint16(0x7C00), "BF16": np.uint16(0x7F80)}


def nonfinite_tensors(
    checkpoint: Checkpoint, names: Iterable[str], *, stop: threading.Event | None = None
) -> list[str]:
    """Canonical names of the tensors that hold NaN or infinity, in the order given.

    Integers are finite; packed types, which numpy cannot hold, are not looked into. Once `stop` is set, the search
    ends with `CancelledError`.
    """
    return [name for name in names if not _is_finite(checkpoint.tensors[name], stop)]


def _is_finite(info: TensorInfo, stop: threading.Event | None) -> bool:
    dtype = numpy_dtype(info.dtype)
    if dtype is None or info.dtype in INTEGERS:
        return True
    if mask := _EXPONENT.get(info.dtype):
        pieces = (np.frombuffer(piece, np.uint16) for piece in stream_bytes(info, stop=stop))
        return not any(((piece & mask) == mask).any() for piece in pieces)
    return all(_all_finite(np.frombuffer(piece, dtype)) for piece in stream_bytes(info, stop=stop))


def _all_finite(piece: Array) -> bool:
    """A finite sum proves all terms finite; an infinite one may have overflowed, so look at each."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(piece.sum())) or bool(np.isfinite(piece).all())
