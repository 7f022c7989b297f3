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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nufilt_jax.checkpoints.dtypes import AnyArray, Array
from nufilt_jax.durable import make_folder, move, sync_tree
from nufilt_jax.errors import CheckpointError, OutputError, Problem
from nufilt_jax.output.documents import read_json, write_json
from nufilt_jax.output.recipe import Step

_ROOM = 1.1  # free space asked for, per byte of state
_SLACK = 1 << 17  # bytes that orbax writes whatever the size: measured at 30 kB
_PLAIN = re.compile(r"[\w/.-]+", re.ASCII)
_FOLDER = re.compile(r"window-(?P<number>\d{4,})(-\d+)?")
_ARRAYS, _TOLD = "arrays", "window.json"
_AGAIN = "merge again from the start"

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
            raise OutputError(Problem(str(folder / _TOLD), f"is damaged: {error}", _AGAIN)) from error
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
    _save_arrays(draft / _ARRAYS, arrays)
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
        with _quiet(), _spelt_plainly(folder) as path, ocp.Checkpointer(handler) as checkpointer:
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


class Stored:
    """All that some windows on disk hold, layer by layer: whatever windows are laid over them now.

    Where two hold a layer, the one that holds more tasks counts. A context, in which arrays can be read.
    """

    def __init__(self, windows: Iterable[StoredWindow] = ()) -> None:
        self._homes: dict[str, StoredWindow] = {}
        for window in windows:
            self.add(window)
        self._readers = contextlib.ExitStack()
        self._checkpointer: Any = None

    def add(self, window: StoredWindow) -> None:
        """Takes in a window that is on disk."""
        for layer in window.layers:
            if layer not in self._homes or self._homes[layer].done <= window.done:
                self._homes[layer] = window

    @property
    def least(self) -> int:
        """Number of tasks that are merged into every layer that is in some window."""
        return min((window.done for window in self._homes.values()), default=0)

    @property
    def layers(self) -> list[str]:
        """Names of all layers that are in some window."""
        return list(self._homes)

    def holds(self, layer: str) -> bool:
        """Whether a layer is in some window."""
        return layer in self._homes

    def windows_of(self, layers: Iterable[str]) -> list[StoredWindow]:
        """The windows in which some layers are found."""
        homes = (self._homes[layer] for layer in layers if layer in self._homes)
        return list({window.folder: window for window in homes}.values())

    @property
    def next_number(self) -> int:
        """A number that no window has."""
        return 1 + max((window.number for window in self._homes.values()), default=-1)

    def done(self, layer: str) -> int:
        """Number of tasks that are merged into a layer."""
        return self._homes[layer].done if layer in self._homes else 0

    def records(self, layers: Iterable[str]) -> tuple[CellRecord, ...]:
        """What each task did to some layers into which the same tasks are merged.

        The time and losses of a window of then are told with its first layer.
        """
        layers = tuple(layers)
        homes = self.windows_of(layers)
        records = []
        for row in zip(*(window.cells for window in homes), strict=True):
            told = [cell for cell, window in zip(row, homes, strict=True) if window.layers[0] in layers]
            step = Step.joined([cell.step for cell in told]) if told else Step(task=row[0].step.task)
            records.append(CellRecord(step, _forecast_of(layers, [cell.forecast for cell in row])))
        return tuple(records)

    def __enter__(self) -> "Stored":
        return self

    def __exit__(self, *_: object) -> None:
        self._readers.close()
        self._checkpointer = None

    def deltas(self, layers: Iterable[str]) -> dict[str, Array]:
        """D of some layers.

        Raises:
          CheckpointError: one is missing or damaged.
        """
        wanted: dict[Path, list[str]] = {}
        for layer in layers:
            if layer not in self._homes:
                what = "the state of the merge does not hold the tensors that the recipe selects"
                raise CheckpointError(Problem(layer, what, _AGAIN))
            wanted.setdefault(self._homes[layer].folder, []).append(layer)
        return {
            name: array
            for folder, members in wanted.items()
            for name, array in self._restored(folder, {"delta": members})["delta"].items()
        }

    def others(self, layers: Iterable[str]) -> dict[str, dict[str, Array]]:
        """The groups beside D of all windows that hold some of the layers."""
        found: dict[str, dict[str, Array]] = {}
        for folder in (window.folder for window in self.windows_of(layers)):
            with _failures(folder), _spelt_plainly(folder / _ARRAYS) as path:
                tree = self._reader().metadata(path).item_metadata.tree
            names = {group: list(named) for group, named in tree.items() if group != "delta" and named}
            for group, named in (self._restored(folder, names) if names else {}).items():
                found[group] = found.get(group, {}) | named
        return found

    def _restored(self, folder: Path, names: Mapping[str, Iterable[str]]) -> dict[str, dict[str, Array]]:
        """Some arrays of each group, and nothing else read."""
        import orbax.checkpoint as ocp

        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        how = {group: dict.fromkeys(members, as_numpy) for group, members in names.items()}
        item = {group: dict.fromkeys(members, 0) for group, members in names.items()}
        part = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        with _failures(folder), _spelt_plainly(folder / _ARRAYS) as path:
            return self._reader().restore(path, args=part)

    def _reader(self) -> Any:
        import orbax.checkpoint as ocp

        if self._checkpointer is None:
            self._readers.enter_context(_quiet())
            self._checkpointer = self._readers.enter_context(ocp.Checkpointer(ocp.PyTreeCheckpointHandler()))
        return self._checkpointer


def _forecast_of(layers: Iterable[str], parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The forecast of some layers, from those of the windows that hold them."""
    wanted = set(layers)
    parts = list(parts)
    near = [name for part in parts for name in part["near_equal_cuts"] if name in wanted]
    rows = {name: row for part in parts for name, row in part["layers"].items() if name in wanted}
    return {"near_equal_cuts": near, "layers": rows}


@contextlib.contextmanager
def _failures(folder: Path) -> Iterator[None]:
    """Turns what orbax raises into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        what = f"the state of the merge cannot be read: {type(error).__name__}: {error}"
        raise CheckpointError(Problem(str(folder), what, _AGAIN)) from error
