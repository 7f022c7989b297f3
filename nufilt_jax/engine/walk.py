"""Walks the grid of a merge: reads ahead, solves cell after cell, and keeps what is done."""

import dataclasses
import threading
import time
from collections.abc import Mapping
from typing import Any, cast

from nufilt_jax.engine.ahead import CompileAhead, ReadAhead
from nufilt_jax.engine.cell import TaskAtHand, examples, file_entry, load_task, rule_of, touched, update
from nufilt_jax.engine.factors import kept, restored
from nufilt_jax.engine.grid import Cell, Window, cells, dealt
from nufilt_jax.engine.hosts import Hosts, StoppedError
from nufilt_jax.engine.memory import release_memory
from nufilt_jax.engine.merged import StoredDelta, merged_tensors
from nufilt_jax.engine.plan import Plan
from nufilt_jax.engine.records import forecast_entry, step_of
from nufilt_jax.engine.row import Row
from nufilt_jax.engine.survey import Survey
from nufilt_jax.engine.timing import Clock
from nufilt_jax.engine.unchanged import ChangedError, HashedFiles
from nufilt_jax.engine.uninterrupted import uninterrupted
from nufilt_jax.engine.watching import Scorer, Watcher
from nufilt_jax.errors import EvaluationError, NufiltError
from nufilt_jax.methods.stacked import Params, Tensor
from nufilt_jax.methods.state import MergeState
from nufilt_jax.output.place import OutputPlace
from nufilt_jax.output.recipe import Recipe, Step
from nufilt_jax.output.state import CellRecord, StoredWindow
from nufilt_jax.output.stored import Stored, forecast_of

KEPT_EVERY = 60.0  # seconds of work after which a state is written at the latest, if no cell takes longer
_KEEPING_SHARE = 0.05  # of the time of a run that writing states in between may take
_WRITE_RATE = 5e8  # bytes of state per second, until one has been written


class Walk:
    """One run over the grid of a plan. After `go`, `delta` gives D of every layer, and `rows` what was done.

    One window is in memory at a time. Its D stays on the device until the walk leaves it; between two cells all of
    it is valid, and then it is kept: at the end of a row, and in between as often as that costs little, at least after
    `KEPT_EVERY` seconds of work.
    """

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        place: OutputPlace,
        stored: Stored,
        watcher: Watcher,
        clock: Clock,
        evaluation: Scorer | None,
        outside: Mapping[str, float],
        hosts: Hosts,
        ahead: CompileAhead | None,
        files: HashedFiles,
    ) -> None:
        self._outside, self._hosts, self._ahead, self._files = outside, hosts, ahead, files
        self._plan, self._recipe, self._place, self._stored = plan, recipe, place, stored
        self._watcher, self._clock, self._evaluation = watcher, clock, evaluation
        self._names = [source.name for source in plan.sources]
        self.rows = [Row(window, list(stored.records(window.layers))) for window in plan.rows]
        for row in self.rows:
            row.records = [CellRecord(cell.step.as_resumed(), cell.forecast) for cell in row.records[: row.window.done]]
        # What a step says of the model as a whole: from the recipe so far, and then as it is found out.
        self._told = {step.task: step for step in recipe.steps}
        self._row: Row | None = None
        self._rule = rule_of(plan, plan.rows[0])
        self._state: MergeState | None = None  # of the row; None while a program is changing it
        self._since = time.perf_counter()
        self._write_rate = _WRITE_RATE
        self._mine = plan.rows if hosts.is_alone else dealt(plan.rows, len(self._names), hosts.count)[hosts.index]
        self._survey = Survey(plan, stored, hosts, self._mine)

    # What a run is.

    def go(self) -> None:
        """Merges what is not merged yet.

        Raises:
          NufiltError: a solution is not finite, the state is damaged, or the disk is full.
        """
        plan, hosts = self._plan, self._hosts
        pending = list(cells(self._mine, len(self._names), plan.walk, plan.n_looks, plan.rows))
        if hosts.is_first and (pending or not hosts.is_alone):
            self._place.record(self.recipe())  # whether the disk takes it is known before any work
        hosts.meet("begun")
        if not hosts.is_first:  # what the first wrote is seen by those alone who share its file system
            self._place.require_begun()
        self._survey.begin(len(self._names))
        self._since = time.perf_counter()
        try:
            if not pending or (plan.recorded is not None and not plan.recorded.is_written):
                self._evaluate_column()  # as far as an earlier run came, which may have ended before it did
            with ReadAhead(self._load, pending) as tasks:
                for number, cell in enumerate(pending):
                    hosts.check()
                    self._enter(cell.window)
                    if cell.look is not None:
                        self._look(cell, tasks, number, len(pending))
                        continue
                    self._merge(cell, tasks, number, len(pending))
                    if plan.walk == "columns":
                        self._evaluate_column()
                    following = pending[number + 1].window if number + 1 < len(pending) else None
                    self._keep_if_due(is_last=following is not cell.window)
        except BaseException as error:
            # What is merged is kept however a run ends, unless the same command would only fail again.
            if not isinstance(error, NufiltError) or isinstance(error, EvaluationError | StoppedError | ChangedError):
                self._keep()
            raise
        if not hosts.is_alone:
            hosts.meet("walked")
            self._take_in()

    def _take_in(self) -> None:
        """Takes in what the other processes have done, from disk."""
        for window in self._place.windows():
            self._stored.add(window)
        for row in self.rows:
            if row.window not in self._mine:
                done = list(self._stored.records(row.window.layers))
                row.records += done[len(row.records) :]
                row.kept = self._stored.windows_of(row.window.layers)[0]

    def recipe(self) -> Recipe:
        """The recipe as far as windows are kept on disk."""
        windows = tuple(row.window.told(row.n_kept) for row in self.rows)
        done = min(row.n_kept for row in self.rows)
        return dataclasses.replace(self._recipe, steps=self.steps(done), windows=windows)

    def steps(self, done: int) -> tuple[Step, ...]:
        """The first steps, of the whole model."""
        parts = zip(*(row.records[:done] for row in self.rows), strict=True)
        joined = [Step.joined([cell.step for cell in column]) for column in parts]
        return tuple(step.told(self._told.get(step.task)) for step in joined)

    def forecast(self) -> dict[str, Any]:
        """The content of `forecast.json`."""
        layers = [layer for row in self.rows for layer in row.window.layers]
        columns = zip(*(row.records for row in self.rows), strict=True)
        return {
            "steps": [
                {"task": column[0].step.task, **forecast_of(layers, [cell.forecast for cell in column])}
                for column in columns
            ]
        }

    @property
    def windows(self) -> list[StoredWindow]:
        """All windows, as they stand on disk."""
        found = (self._stored.windows_of(row.window.layers) for row in self.rows)
        return list({window.folder: window for windows in found for window in windows}.values())

    @property
    def added(self) -> dict[str, Tensor]:
        """Parameters that the method adds to the model."""
        if self._state is not None:
            return dict(self._state.added)
        # Rules that add any work on the whole model, so that there is one window.
        return dict(self._stored.others(self._plan.rows[0].layers).get("added", {}))

    @property
    def delta(self) -> Mapping[str, Tensor]:
        """D of every layer, on the host: of the window in memory, or read from disk when it is asked for."""
        if self._state is not None and len(self.rows) == 1:
            return self._state.delta.on_host()
        return StoredDelta(self._stored)

    # A window.

    def _enter(self, window: Window) -> None:
        """Takes a window into memory, as it was left."""
        if self._row is not None and self._row.window is window:
            return
        self._row = next(row for row in self.rows if row.window is window)
        self._rule = rule_of(self._plan, window)
        state = self._rule.init(self._base(window))
        done = len(self._row.records)
        if done:
            delta = restored(self._stored.deltas(window.layers), state.delta)
            beside = self._stored.others(window.layers)
            extra, added = beside.get("extra", {}), beside.get("added", {})
            state = dataclasses.replace(state, delta=delta, extra=extra, added=added, step=done)
        self._state = state

    def _base(self, window: Window) -> Params:
        # Only a rule that runs the model needs the tensors that it does not touch.
        return self._plan.base.read(None if self._plan.examples else touched(window))

    def _keep_if_due(self, *, is_last: bool) -> None:
        work, row = time.perf_counter() - self._since, cast(Row, self._row)
        cost = row.window.n_bytes / self._write_rate
        if is_last or work >= KEPT_EVERY or cost <= _KEEPING_SHARE * work:
            self._keep()
        if is_last and len(self.rows) > 1:
            self._leave()

    def _leave(self) -> None:
        self._row = self._state = None
        release_memory()

    def _keep(self) -> None:
        """Makes what the window in memory holds durable."""
        row, state = self._row, self._state
        if row is None or state is None or len(row.records) == row.n_kept:
            return
        start = time.perf_counter()
        told = [CellRecord(cell.step.told(self._told.get(cell.step.task)), cell.forecast) for cell in row.records]
        if not self._hosts.is_alone:  # writing would make anew a folder that has vanished, without its recipe
            self._place.require_begun()
        deltas, ranks = kept(state.delta.on_host(), row.window.stacks, len(told))
        window = StoredWindow(self._place.state, row.window.number, row.window.layers, tuple(told), ranks)
        arrays: dict[str, Any] = {**deltas, "extra": dict(state.extra), "added": dict(state.added)}
        arrays["numbers"] = dict(self._survey.numbers(window.done - 1))
        # Before the recipe: what that tells of stands on disk.
        row.kept = self._place.keep(window, arrays)
        self._stored.add(row.kept)
        if self._hosts.is_first:
            self._place.record(self.recipe())
        self._since = time.perf_counter()
        self._write_rate = max(1.0, row.window.n_bytes) / (self._since - start)  # never 0: costs are divided by it
        self._clock.add("write_state", self._since - start)

    # A cell.

    def _load(self, cell: Cell, stop: threading.Event) -> TaskAtHand:
        return load_task(self._plan, cell.window, self._names[cell.task], self._files, stop)

    def _merge(self, cell: Cell, tasks: ReadAhead[Cell, TaskAtHand], number: int, total: int) -> None:
        row, name = cast(Row, self._row), self._names[cell.task]
        start = time.perf_counter()
        task = self._taken(cell, tasks, number, total)
        data = examples(self._plan, name, cell.task + 1)
        past = next((row.window.layers for row in self.rows if len(row.records) > cell.task), ())
        numbers = self._survey.numbers(cell.task, past)
        # Before anything can stop the run: what is kept of the step has it.
        self._tell(name, outside=self._outside.get(name))
        if self._plan.examples:
            self._tell(name, examples=file_entry(self._plan.examples[name]))
        with uninterrupted():
            state, self._state = cast(MergeState, self._state), None
            self._state = state = update(self._rule, state, task, self._watcher, data, numbers, self._ahead)
            step = step_of(name, time.perf_counter() - start, state.report, task.clock.as_dict())
            row.records.append(CellRecord(step, forecast_entry(state.report)))
        del task, state  # before the next one is read
        release_memory()

    def _look(self, cell: Cell, tasks: ReadAhead[Cell, TaskAtHand], number: int, total: int) -> None:
        """Looks at a window, and leaves it."""
        self._keep()  # what the column before has made of it
        with self._clock.spent_on("survey"):
            task = self._taken(cell, tasks, number, total)
            state, self._state = cast(MergeState, self._state), None
            self._survey.look(cell, self._rule, state, task)
            del task, state
            self._leave()

    def _taken(self, cell: Cell, tasks: ReadAhead[Cell, TaskAtHand], number: int, total: int) -> TaskAtHand:
        """The task vector of a cell, which begins; that of the next one then begins to be read."""
        window = f"window {self._plan.rows.index(cell.window) + 1} of {len(self.rows)}" if len(self.rows) > 1 else ""
        self._watcher.cell(self._names[cell.task], window, number, total)
        start = time.perf_counter()
        task = tasks.take()
        task.clock.add("wait", time.perf_counter() - start)
        if self._plan.memory.read_ahead:
            tasks.begin()
        release_memory()
        return task

    def _tell(self, task: str, **what: Any) -> None:
        self._told[task] = dataclasses.replace(self._told.get(task, Step(task=task)), **what)

    # A column.

    def _evaluate_column(self) -> None:
        """Scores the model if all windows stand after the same task, and that was not done."""
        done = {len(row.records) for row in self.rows}
        if self._evaluation is None or len(done) > 1 or done == {0}:
            return
        name = self._names[done.pop() - 1]
        if self._evaluation.covers(self._told.get(name, Step(task=name))):
            return
        if len(self.rows) > 1:
            self._keep()  # the model is read window by window, from disk
        with self._clock.spent_on("evaluate"):
            with self._files.required(self._plan.base):
                entry = self._evaluation.entry(self._whole(), name)
            self._tell(name, **entry)
        if len(self.rows) > 1:
            self._place.record(self.recipe())

    def _whole(self) -> dict[str, Any]:
        """All parameters of the merged model."""
        if self._state is None and len(self.rows) == 1:
            self._enter(self.rows[0].window)
        touched = merged_tensors(self._plan.base.read(self._plan.selection.touched), self.delta)
        return {**self._plan.base.read(), **{name: x.made() for name, x in touched.items()}, **self.added}
