"""The state of a merge on disk: what a later run needs to go on where this one stops.

One folder per window of the grid: `window-0002-3/` holds the D of window number 2 after 3 tasks (`window-0002/` in a
finished merge), `arrays.safetensors` with their checksums and `window.json` with its layers and what each step did to
them. So a folder tells by itself what it holds, and other windows can be laid over the same layers. Arrays that are
spread over several processes stand in `arrays/`, an orbax checkpoint.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from nufilt_jax.durable import make_folder, move, sync_tree
from nufilt_jax.errors import OutputError, Problem, raise_all
from nufilt_jax.output.arrays import Groups, write_arrays
from nufilt_jax.output.documents import read_json, write_json
from nufilt_jax.output.kinds import WINDOW, require
from nufilt_jax.output.recipe import Step
from nufilt_jax.output.spread import is_spread, save_spread

_SLACK = 1 << 16  # bytes asked for beside the arrays' own: of the header, and of what tells of the window
_FOLDER = re.compile(r"window-(?P<number>\d{4,})(-\d+)?")
ARRAYS, SPREAD, _TOLD = "arrays.safetensors", "arrays", "window.json"
DELTA, FACTORS = "delta", ("basis", "rows")  # the groups of arrays that make up D
AGAIN = "merge again from the start"
MAKE_ROOM = "free some space and run the same command again"


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
      ranks: of the layers whose D is kept in factors.
    """

    folder: Path
    number: int
    layers: tuple[str, ...]
    cells: tuple[CellRecord, ...]
    ranks: Mapping[str, int] = MappingProxyType({})

    @property
    def done(self) -> int:
        """Number of tasks that are merged into it."""
        return len(self.cells)

    def named(self, done: int | None = None) -> str:
        """The name of its folder: in a finished merge, or with the number of its tasks."""
        return f"window-{self.number:04d}" + ("" if done is None else f"-{done}")


def stored_windows(root: Path) -> list[StoredWindow]:
    """The windows in a folder, of each number the one with the most tasks.

    Raises:
      OutputError: what a window tells of itself is damaged.
    """
    found: dict[int, StoredWindow] = {}
    # In one order on every disk: which windows hold a layer first decides the order of layers.
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        name = _FOLDER.fullmatch(folder.name)
        if name is None or not (folder / _TOLD).is_file():
            continue
        told = read_json(folder / _TOLD, AGAIN)
        try:
            require(told, WINDOW)
            cells = tuple(CellRecord(Step.from_json(cell), dict(cell["forecast"])) for cell in told["cells"])
            ranks = {str(layer): int(rank) for layer, rank in told.get("ranks", {}).items()}
            window = StoredWindow(folder, int(name["number"]), tuple(map(str, told["layers"])), cells, ranks)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OutputError(Problem(str(folder / _TOLD), f"is damaged: {error}", AGAIN)) from error
        # A run that is killed before it removes the older state leaves both.
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
    shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed here
    draft.mkdir()
    _save_arrays(draft, arrays)
    cells = [{**cell.step.to_json(), "forecast": cell.forecast} for cell in window.cells]
    factored = {"ranks": dict(window.ranks)} if window.ranks else {}
    write_json(draft / _TOLD, {"tasks": window.done, "layers": list(window.layers), **factored, "cells": cells})
    sync_tree(draft)
    shutil.rmtree(target, ignore_errors=True)  # no folder that holds something is replaced by a rename
    move(draft, target)
    # Only now: until the new state has its name, the older one is all there is.
    for old in root.glob(f"{window.named()}-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return window._replace(folder=target)


def _save_arrays(draft: Path, groups: Groups) -> None:
    if any(is_spread(x) for named in groups.values() for x in named.values()):
        save_spread(draft / SPREAD, groups)
        return
    path = draft / ARRAYS
    try:
        raise_all(OutputError, room_problems(draft, sum(x.nbytes for named in groups.values() for x in named.values())))
        write_arrays(path, groups)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        what = f"the state cannot be written: {error.strerror or error}"
        raise OutputError(Problem(str(path), what, MAKE_ROOM)) from error


def room_problems(folder: Path, n_bytes: int, leaving: int = 0) -> list[Problem]:
    """Tells both numbers where the disk has no room; what it does not tell of, as quotas, is met when room is taken.

    Args:
      folder: on the disk.
      n_bytes: of a window's arrays.
      leaving: bytes that are there now, and will be removed first.
    """
    needed = n_bytes + _SLACK
    if (free := shutil.disk_usage(folder).free + leaving) >= needed:
        return []
    what = f"the state needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free"
    return [Problem(str(folder), what, MAKE_ROOM)]
