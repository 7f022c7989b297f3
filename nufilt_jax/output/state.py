"""The state of a merge on disk: what a later run needs to go on where this one stops.

One folder per window of the grid: `window-0002-3/` holds the D of window number 2 after 3 tasks (`window-0002/` in a
finished merge), `arrays/` as an orbax checkpoint and `window.json` with its layers and what each step did to them. So a
folder tells by itself what it holds, and other windows can be laid over the same layers.
"""

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nufilt_jax.checkpoints.dtypes import AnyArray
from nufilt_jax.durable import make_folder, move, sync_tree
from nufilt_jax.errors import OutputError, Problem
from nufilt_jax.output.documents import read_json, write_json
from nufilt_jax.output.recipe import Step

_ROOM = 1.1  # free space asked for, per byte of state
_SLACK = 1 << 17  # bytes that orbax writes whatever the size: measured at 30 kB
_PLAIN = re.compile(r"[\w/.-]+", re.ASCII)
_FOLDER = re.compile(r"window-(?P<number>\d{4,})(-\d+)?")
ARRAYS, _TOLD = "arrays", "window.json"
AGAIN = "merge again from the start"

Groups = Mapping[str, Mapping[str, AnyArray]]  # named groups of arrays, as `delta` and `extra` of a merge


class CellRecord(NamedTuple):
    """What merging one task into one window did.

    Attributes:
      step: the window's part of the step.
      forecast: of its layers, as in `forecast.json`.
    """

    step: Step
    forecast: dict[str, Any]


class StoredWindow(NamedTuple):
    """A window on disk.

    Attributes:
      folder: where.
      number: of the window.
      layers: whose D it holds, those included that follow `--other-params`.
      cells: what each of its tasks did.
    """

    folder: Path
    number: int
    layers: tuple[str, ...]
    cells: tuple[CellRecord, ...]

    @property
    def done(self) -> int:
        """Number of tasks that are merged into it."""
        return len(self.cells)

    def named(self, done: int | None = None) -> str:
        """The name of its folder: in a finished merge, or with the number of its tasks."""
        return f"window-{self.number:04d}" + ("" if done is None else f"-{done}")


class _Lent(np.ndarray):
    """A view that orbax writes from: it would copy the whole state first, lest somebody change it meanwhile."""

    def __deepcopy__(self, memo: dict[int, Any] | None = None, /) -> "_Lent":
        return self


def stored_windows(root: Path) -> list[StoredWindow]:
    """The windows in a folder, of each number the one with the most tasks.

    Raises:
      OutputError: what a window tells of itself is damaged.
    """
    found: dict[int, StoredWindow] = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        name = _FOLDER.fullmatch(folder.name)
        if name is None or not (folder / _TOLD).is_file():
            continue
        told = read_json(folder / _TOLD)
        try:
            cells = tuple(CellRecord(Step.from_json(cell), dict(cell["forecast"])) for cell in told["cells"])
            window = StoredWindow(folder, int(name["number"]), tuple(map(str, told["layers"])), cells)
        except (KeyError, TypeError, ValueError) as error:
            raise OutputError(Problem(str(folder / _TOLD), f"is damaged: {error}", AGAIN)) from error
        if window.number not in found or found[window.number].done < window.done:
            found[window.number] = window
    return list(found.values())


def save_window(root: Path, window: StoredWindow, arrays: Groups) -> StoredWindow:
    """Writes a window, whole or not at all; older states of the same window then go.

    Args:
      root: the folder of the windows.
      window: what it tells; its folder is chosen here.
      arrays: its state.

    Raises:
      OutputError: there is no room, or the folder cannot be written.
    """
    target = root / window.named(window.done)
    draft = root / f".{target.name}"
    make_folder(root)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    _save_arrays(draft / ARRAYS, arrays)
    cells = [{**cell.step.to_json(), "forecast": cell.forecast} for cell in window.cells]
    write_json(draft / _TOLD, {"tasks": window.done, "layers": list(window.layers), "cells": cells})
    sync_tree(draft)
    shutil.rmtree(target, ignore_errors=True)
    move(draft, target)
    for old in root.glob(f"{window.named()}-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return window._replace(folder=target)


def _save_arrays(folder: Path, arrays: Groups) -> None:
    import orbax.checkpoint as ocp

    groups = {group: {name: np.asarray(x).view(_Lent) for name, x in named.items()} for group, named in arrays.items()}
    _require_room(folder.parent, sum(x.nbytes for named in groups.values() for x in named.values()))
    try:
        # Not compressed: float32 task vectors hardly shrink, and the processor is busy merging.
        handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
        with quiet(), spelt_plainly(folder) as path, ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, groups)
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
def spelt_plainly(folder: Path) -> Iterator[Path]:
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
def quiet() -> Iterator[None]:
    """Keeps the tracebacks of orbax's threads off stderr; the failure itself is raised, and told in one line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
