"""What only a program may set, and a library may not."""

import contextlib
import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from nufilt_jax.compile_cache import default_folder

_CACHE = "JAX_COMPILATION_CACHE_DIR"
# With which programs check their own use of JAX; under them optax and JAX's own functions fail.
_CHECKS = ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION", "JAX_TRANSFER_GUARD")


def prepare_process() -> None:
    """Sets memory preallocation, the compile cache, how much the libraries talk, and JAX's checks of programs: none."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it says on stderr that it found no torch
    for name in [name for name in os.environ if name.startswith(_CHECKS)]:
        del os.environ[name]
    if _CACHE not in os.environ and (folder := default_folder()):
        os.environ[_CACHE] = folder
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if not _can_be_written(os.environ.get(_CACHE, "")):
        os.environ.pop(_CACHE, None)
    # A full disk, or a folder that only looks as if it could be written: what is not kept is compiled again.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def _can_be_written(folder: str) -> bool:
    """Whether a folder is there, or can be made, and takes files; nothing is made to find out."""
    if "://" in folder:  # JAX's own matter
        return True
    path = Path(folder).absolute()
    there = next(path for path in (path, *path.parents) if os.path.lexists(path))
    return bool(folder) and there.is_dir() and os.access(there, os.W_OK | os.X_OK)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Loads libraries without looking for cycles of garbage among what they make: it takes a sixth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
