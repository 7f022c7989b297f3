"""The state of a merge on disk: what a later run needs to go on where this one stops."""

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nufilt_jax.checkpoints.dtypes import AnyArray, Array
from nufilt_jax.errors import CheckpointError, OutputError, Problem

_ROOM = 1.1  # free space asked for, per byte of state
_PLAIN = re.compile(r"[\w/.-]+", re.ASCII)
_SLACK = 1 << 17  # bytes that orbax writes whatever the size: measured at 30 kB


class _Lent(np.ndarray):
    """A view that orbax writes from: it would copy the whole state first, lest somebody change it meanwhile."""

    def __deepcopy__(self, memo: dict[int, Any] | None = None, /) -> "_Lent":
        return self


def save_state(folder: Path, arrays: Mapping[str, Mapping[str, AnyArray]], step: int) -> None:
    """Writes a state, whole or not at all, as an orbax checkpoint.

    Args:
      folder: where; must not exist.
      arrays: named groups of arrays, as `delta` and `extra` of a merge.
      step: number of tasks merged.

    Raises:
      OutputError: there is no room, or the folder cannot be written.
    """
    import orbax.checkpoint as ocp

    groups = {group: {name: np.asarray(x).view(_Lent) for name, x in named.items()} for group, named in arrays.items()}
    _require_room(folder.parent, sum(x.nbytes for named in groups.values() for x in named.values()))
    try:
        # Not compressed: float32 task vectors hardly shrink, and the processor is busy merging.
        handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
        with _quiet(), _spelt_plainly(folder) as path, ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, {**groups, "step": step})
    except (OSError, ValueError, RuntimeError) as error:
        what = f"the state cannot be written: {error}"
        raise OutputError(Problem(str(folder), what, "free some space and run the same command again")) from error


def _require_room(folder: Path, n_bytes: int) -> None:
    """Finds out beforehand: where a disk is full, orbax says so from its threads, in many lines."""
    reserved = folder / "room"
    needed = int(_ROOM * n_bytes) + _SLACK
    try:
        if (free := shutil.disk_usage(folder).free) < needed:
            what = f"the state needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free"
            raise OutputError(Problem(str(folder), what, "free some space and run the same command again"))
        if hasattr(os, "posix_fallocate"):  # knows of quotas too
            with reserved.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, needed)
    finally:
        reserved.unlink(missing_ok=True)


@contextlib.contextmanager
def _spelt_plainly(folder: Path) -> Iterator[Path]:
    """A path that orbax takes as it is: it knows UTF-8 alone, and reads a pattern or an address into some names."""
    path = folder.absolute()
    if _PLAIN.fullmatch(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="nufilt-") as scratch:
        link = Path(scratch) / "folder"
        link.symlink_to(path.parent)
        yield link / path.name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the tracebacks of orbax's threads off stderr; the failure itself is raised, and told in one line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_state(folder: Path) -> tuple[dict[str, dict[str, Array]], int]:
    """Reads what `save_state` wrote.

    Returns:
      The groups of arrays, and the number of tasks merged.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    import orbax.checkpoint as ocp

    try:
        with _quiet(), _spelt_plainly(folder) as path, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.restore(path)
        step = int(tree.pop("step"))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        what = f"the state of the merge cannot be read: {type(error).__name__}: {error}"
        raise CheckpointError(Problem(str(folder), what, "merge again from the start")) from error
    return tree, step
