"""Element types: how safetensors spells them, how numpy holds them, and careful casts between them."""

from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

NumpyArray = Shaped[np.ndarray, "..."]
AnyArray = Shaped[Any, "..."]  # numpy or jax: whatever has a shape and a dtype

_NUMPY = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_CODES = {dtype.name: code for code, dtype in _NUMPY.items()}

# Types that numpy cannot hold: copied as raw bytes, never read as numbers.
_PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}

FLOATS = frozenset({"F64", "F32", "BF16", "F16"})  # the types that are merged and converted
INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
OUTPUT_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def is_known(code: str) -> bool:
    """Whether `code` is an element type of the safetensors format."""
    return code in _NUMPY or code in _PACKED_BITS


def bits(code: str) -> int:
    """Bits of one element."""
    return _PACKED_BITS[code] if code in _PACKED_BITS else _NUMPY[code].itemsize * 8


def numpy_dtype(code: str) -> np.dtype | None:
    """The numpy (or ml_dtypes) type of `code`; None for packed types, which numpy cannot hold."""
    return _NUMPY.get(code)


def code_of(dtype_name: str) -> str | None:
    """The safetensors spelling of a numpy type's name, as in `float32` -> `F32`."""
    return _CODES.get(dtype_name)


def cast(value: NumpyArray, dtype: np.dtype) -> NumpyArray:
    """Rounds to nearest even; what is out of range becomes infinite, which `overflows` tells."""
    with np.errstate(over="ignore", invalid="ignore"):
        return value.astype(dtype, copy=False)


def overflows(value: NumpyArray, rounded: NumpyArray) -> bool:
    """Whether a finite number of `value` became infinite in `rounded`."""
    if value.dtype == rounded.dtype:  # nothing was rounded: two passes are saved
        return False
    return bool((np.isfinite(value) & ~np.isfinite(rounded)).any())


def is_exact(value: NumpyArray, rounded: NumpyArray) -> bool:
    """Whether nothing was lost between integers."""
    return value.dtype == rounded.dtype or bool((value == rounded).all())
