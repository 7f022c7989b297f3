"""Reading the state of a merge back, layer by layer."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nufilt_jax.checkpoints.dtypes import NumpyArray
from nufilt_jax.errors import CheckpointError, OutputError, Problem
from nufilt_jax.linalg.factored import Factored
from nufilt_jax.output.arrays import ArrayFile
from nufilt_jax.output.recipe import Step
from nufilt_jax.output.spread import SpreadArrays
from nufilt_jax.output.state import AGAIN, ARRAYS, DELTA, FACTORS, SPREAD, CellRecord, StoredWindow

_OF_D = (DELTA, *FACTORS)


class Stored:
    """All that some windows on disk hold, layer by layer: whatever windows are laid over them now.

    Where two hold a layer, the one that holds more tasks counts. A context, in which arrays can be read.
    """

    def __init__(self, windows: Iterable[StoredWindow] = ()) -> None:
        self._homes: dict[str, StoredWindow] = {}
        self._contexts = contextlib.ExitStack()
        self._files: dict[Path, ArrayFile | SpreadArrays] = {}
        for window in windows:
            self.add(window)

    def add(self, window: StoredWindow) -> None:
        """Takes in a window that is on disk."""
        self._files.pop(window.folder, None)  # it may stand in the place of an older one
        for layer in window.layers:
            # Of as many tasks the later counts too: the same window, kept once more.
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

    def rank(self, layer: str) -> int | None:
        """The rank of a layer whose D is kept in factors; None for any other."""
        return self._homes[layer].ranks.get(layer) if layer in self._homes else None

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
            records.append(CellRecord(step, forecast_of(layers, [cell.forecast for cell in row])))
        return tuple(records)

    def __enter__(self) -> "Stored":
        return self

    def __exit__(self, *_: object) -> None:
        self._contexts.close()
        self._files.clear()

    def look_into(self, layers: Iterable[str]) -> None:
        """Reads the header of every window in which some layers are found, but of those spread over processes.

        Raises:
          CheckpointError: one is missing or damaged.
        """
        for window in self.windows_of(layers):
            if not (window.folder / SPREAD).is_dir():
                with _failures(window.folder):
                    self._file(window.folder)

    def deltas(self, layers: Iterable[str]) -> dict[str, Any]:
        """D of some layers, in factors where it is kept so.

        Raises:
          CheckpointError: one is missing or damaged.
        """
        wanted: dict[Path, list[str]] = {}
        for layer in layers:
            if layer not in self._homes:
                what = "the state of the merge does not hold the tensors that the recipe selects"
                raise CheckpointError(Problem(layer, what, AGAIN))
            wanted.setdefault(self._homes[layer].folder, []).append(layer)
        found: dict[str, Any] = {}
        for folder, members in wanted.items():
            factored = [layer for layer in members if self.rank(layer) is not None]
            dense = [layer for layer in members if layer not in factored]
            factors = [self._read(folder, group, factored) if factored else {} for group in FACTORS]
            found |= self._read(folder, DELTA, dense) if dense else {}
            found |= {layer: Factored(*(named[layer] for named in factors)) for layer in factored}
        return found

    def others(self, layers: Iterable[str]) -> dict[str, dict[str, NumpyArray]]:
        """The groups beside D of all windows that hold some of the layers, but for what is of other layers."""
        found: dict[str, dict[str, NumpyArray]] = {}
        layers = tuple(layers)
        for window in self.windows_of(layers):
            foreign = set(window.layers).difference(layers)
            with _failures(window.folder):
                names = self._file(window.folder).names
            for group, named in names.items():
                wanted = [name for name in named if name not in foreign]
                if group not in _OF_D and wanted:
                    found[group] = found.get(group, {}) | self._read(window.folder, group, wanted)
        return found

    def _read(self, folder: Path, group: str, names: Iterable[str]) -> dict[str, NumpyArray]:
        with _failures(folder):
            return self._file(folder).read(group, names)

    def _file(self, folder: Path) -> ArrayFile | SpreadArrays:
        if folder not in self._files:
            if (folder / SPREAD).is_dir():
                self._files[folder] = self._contexts.enter_context(SpreadArrays(folder / SPREAD))
            else:
                self._files[folder] = ArrayFile(folder / ARRAYS)
        return self._files[folder]


def forecast_of(layers: Iterable[str], parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The forecast of some layers, from those of the windows that hold them."""
    wanted = set(layers)
    parts = list(parts)
    near = [name for part in parts for name in part["near_equal_cuts"] if name in wanted]
    rows = {name: row for part in parts for name, row in part["layers"].items() if name in wanted}
    return {"near_equal_cuts": near, "layers": rows}


@contextlib.contextmanager
def _failures(folder: Path) -> Iterator[None]:
    """Turns what a damaged state raises into one line; one that cannot be read now is left as it is."""
    try:
        yield
    except OSError as error:
        what = f"the state of the merge cannot be read: {error.strerror or error}"
        where = str(error.filename or folder)
        if _is_gone(error) and folder.is_dir():
            raise CheckpointError(Problem(where, what, AGAIN)) from error
        raise OutputError(Problem(where, what, "nothing of it is lost: try again")) from error
    except (ValueError, KeyError, RuntimeError) as error:
        what = f"the state of the merge cannot be read: {error}"
        raise CheckpointError(Problem(str(folder), what, AGAIN)) from error


def _is_gone(error: OSError) -> bool:
    """Whether a file of the state is not there, which no later try mends; orbax tells that in words alone."""
    return isinstance(error, FileNotFoundError) and (error.filename is not None or error.errno is None)
