"""What a method has to know of the whole model before a task is merged into the first of several windows."""

from collections.abc import Sequence

import jax

from nufilt_jax import methods
from nufilt_jax.engine.cell import Task, naming_files
from nufilt_jax.engine.grid import Cell
from nufilt_jax.engine.plan import Plan
from nufilt_jax.methods.state import MergeState, Numbers
from nufilt_jax.output.stored import Stored


class Survey:
    """The looks before every column of a grid, and the numbers of the whole model that they find.

    They are kept with every window that is merged by them: a run that begins in the middle of a column can look no more
    at what was before it.
    """

    def __init__(self, plan: Plan, stored: Stored) -> None:
        self._plan, self._stored = plan, stored
        self._rule = methods.find(plan.settings.method)
        self._parts: list[Numbers] = []  # of the look under way
        self._numbers: dict[int, Numbers] = {}  # by task

    def look(self, cell: Cell, rule: methods.Merger, state: MergeState, task: Task) -> None:
        """Takes the look of a cell; after the last window's it is known what the look finds. Gives up the state.

        Raises:
          NufiltError: the rule refuses the task; the file is named.
        """
        number, found = cell.look or 0, self._numbers.get(cell.task)
        with naming_files(task.checkpoint):
            self._parts.append(jax.device_get(rule.look(state, task.vector, number, found)))
        if len(self._parts) == len(self._plan.rows):
            joined = self._rule.looks(cell.task)[number].joined
            self._numbers[cell.task] = joined(self._parts, self._plan.settings.config, found)
            self._parts = []

    def numbers(self, task: int, past: Sequence[str] = ()) -> Numbers | None:
        """What was found before a column, in this run or in an earlier one; None if nothing had to be.

        Args:
          task: of the column.
          past: layers into which it is merged already; needed in the middle of a column that an earlier run began.
        """
        if past and self._plan.n_looks(task) and task not in self._numbers:
            self._numbers[task] = self._stored.others(past[:1])["numbers"]
        return self._numbers.get(task)
