"""Files mapped into memory that hold no descriptor.

Python's own map keeps one for as long as it lives, of which macOS gives a process 256: a model of 150 shards and its
tasks would need more.
"""

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

_C = ctypes.CDLL(None, use_errno=True)
_C.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_C.mmap.restype = ctypes.c_void_p
_C.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_C.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value


class _Map:
    """A mapped file, which the arrays that are views of it keep alive; without any it is unmapped."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            address = _C.mmap(None, self._size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
        self._address = address
        # Not at exit: a thread may still be reading then.
        weakref.finalize(self, _C.munmap, address, self._size).atexit = False

    @property
    def __array_interface__(self) -> dict[str, Any]:
        is_read_only = True
        return {"version": 3, "typestr": "|u1", "shape": (self._size,), "data": (self._address, is_read_only)}

    def drop_pages(self) -> None:
        _C.madvise(self._address, self._size, mmap.MADV_DONTNEED)


def map_file(path: Path) -> UInt8[np.ndarray, " bytes"]:
    """A file's bytes, read-only; they are unmapped with the last array that is a view of them."""
    return np.asarray(_Map(path))


def drop_pages(array: Any) -> None:
    """Lets go of the pages of the file that an array is a view of, if it is one."""
    owner = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, _Map):
        owner.drop_pages()
