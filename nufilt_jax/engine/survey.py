"""What a method has to know of the whole model before a task is merged into the first of several windows."""

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nufilt_jax import methods
from nufilt_jax.engine.cell import TaskAtHand, naming_files
from nufilt_jax.engine.grid import Cell, Window, cells
from nufilt_jax.engine.hosts import Hosts
from nufilt_jax.engine.plan import Plan
from nufilt_jax.methods.state import MergeState, Numbers
from nufilt_jax.output.stored import Stored


class Survey:
    """The looks before every column of a grid, and the numbers of the whole model that they find.

    They are kept with every window that is merged by them: a run that begins in the middle of a column can look no more
    at what was before it. Of several processes each looks at its own windows, and tells the others.
    """

    def __init__(self, plan: Plan, stored: Stored, hosts: Hosts, mine: Sequence[Window]) -> None:
        self._plan, self._stored, self._hosts, self._mine = plan, stored, hosts, mine
        self._rule = methods.find(plan.settings.method)
        self._parts: dict[int, Numbers] = {}  # of the look under way, by the window's place
        self._numbers: dict[int, Numbers] = {}  # by task

    def begin(self, n_tasks: int) -> None:
        """A process that has no windows tells that at once, for all looks."""
        if not self._mine:
            everything = cells(self._plan.rows, n_tasks, self._plan.walk, self._plan.n_looks)
            for point in dict.fromkeys(_point(cell) for cell in everything if cell.look is not None):
                self._hosts.tell(point, [])

    def look(self, cell: Cell, rule: methods.Merger, state: MergeState, task: TaskAtHand) -> None:
        """Takes the look of a cell; after the last window's it is known what the look finds. Gives up the state.

        Raises:
          NufiltError: the rule refuses the task; the file is named.
          StoppedError: another process will not tell what it has found.
        """
        number, found = cell.look or 0, self._numbers.get(cell.task, {})
        with naming_files(task.checkpoint):
            seen = rule.look(state, task.vector, number, found)
        self._parts[self._plan.rows.index(cell.window)] = jax.device_get(seen)
        if len(self._parts) == len(self._mine):
            joined = self._rule.looks(cell.task)[number].joined
            self._numbers[cell.task] = joined(self._everybodys(_point(cell)), self._plan.settings.config, found)
            self._parts = {}

    def _everybodys(self, point: str) -> list[Numbers]:
        """What all processes have seen, window by window."""
        if self._hosts.is_alone:
            return [self._parts[place] for place in sorted(self._parts)]
        told = self._hosts.meet(point, [(place, _written(part)) for place, part in self._parts.items()])
        seen = dict(entry for entries in told for entry in entries)
        return [_read(seen[place]) for place in sorted(seen)]  # as from one process: window by window

    def numbers(self, task: int, past: Sequence[str] = ()) -> Numbers:
        """What was found before a column, in this run or in an earlier one; empty if nothing had to be.

        Args:
          task: of the column.
          past: layers into which it is merged already; needed in the middle of a column that an earlier run began.
        """
        if past and self._plan.n_looks(task) and task not in self._numbers:
            self._numbers[task] = self._stored.others(past[:1])["numbers"]  # any layer will do: each window has them
        return self._numbers.get(task, {})


def _point(cell: Cell) -> str:
    return f"look/{cell.task}/{cell.look}"


def _written(numbers: Any) -> Any:
    """Arrays by names, which may be nested, as JSON can hold them."""
    if isinstance(numbers, Mapping):
        return {name: _written(value) for name, value in numbers.items()}
    array = np.ascontiguousarray(numbers)
    return [array.dtype.str, array.shape, base64.b64encode(zlib.compress(array.tobytes())).decode()]


def _read(written: Any) -> Any:
    if isinstance(written, Mapping):
        return {name: _read(value) for name, value in written.items()}
    dtype, shape, data = written
    return np.frombuffer(zlib.decompress(base64.b64decode(data)), dtype).reshape(shape)
