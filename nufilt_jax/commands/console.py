"""What a run shows: progress on stderr while it goes on, tables on stdout when it is done."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from nufilt_jax.commands.planned import grid_lines, show_coverage
from nufilt_jax.commands.text import MOST_COLUMNS
from nufilt_jax.commands.text import show_json as show_json
from nufilt_jax.commands.text import show_line as show_line
from nufilt_jax.commands.text import show_wrapped as show_wrapped
from nufilt_jax.engine.plan import Plan
from nufilt_jax.errors import printable
from nufilt_jax.methods.state import LayerReport
from nufilt_jax.output.facts import Covered
from nufilt_jax.output.recipe import Recipe

_LONG = 10  # characters of a column's head that stay on one line
QUIET_SECONDS = 30.0  # for so long nothing is said on what is no terminal: scripts take a line there for a warning


class ProgressWatcher:
    """A bar on stderr with the cell, the stack just solved and its loss; in a log, a line per cell of a long run."""

    def __init__(self, console: Console, *, quiet: bool, verbose: bool = False) -> None:
        """Takes stderr; `has_told` says whether it has shown there what will be merged.

        Args:
          console: is written to.
          quiet: show neither the bar nor the lines of a long run.
          verbose: tell of everything in a line of its own, quiet or not.
        """
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        shown = console.is_terminal and not quiet and not verbose
        self.progress = Progress(*columns, console=console, transient=True, disable=not shown)
        self._console = console
        # In a log a line for each cell takes the place of the bar, if the run is long enough for somebody to look.
        self._tells_lines, self._begun = not console.is_terminal and not quiet, time.monotonic()
        self._tells_all, self.has_told = verbose, False
        self._bar = self.progress.add_task("reading", total=None)
        self._task, self._total = "reading", 0

    def head(self, plan: Plan, selected: Iterable[Covered], left: Iterable[Covered]) -> None:
        """What will be merged, and in which windows; on no terminal it is told with the results."""
        if not self.progress.disable:
            show_coverage(self._console, selected, left)
            for line in grid_lines(plan):
                show_wrapped(self._console, line)
            self.has_told = True

    def cell(self, task: str, window: str, done: int, total: int) -> None:
        """A cell begins, after `done` of `total`."""
        self._total = total
        self._task = f"{task}, {window} ({done + 1} of {total})" if window else f"{task} ({done + 1} of {total})"
        # Drawn at once: a cell may be over before the bar would move by itself.
        self.progress.update(self._bar, description=self._task, completed=done, total=total, refresh=True)
        if self._tells_lines and not self._tells_all and time.monotonic() - self._begun > QUIET_SECONDS:
            show_line(self._console, f"nufilt: {self._task}")
        self._tell(self._task)

    def stack(self, description: str, report: LayerReport) -> None:
        """A group of layers is solved."""
        text = f"{self._task}: {description}"
        if report.has_losses:
            first, last = np.asarray(report.losses).sum(axis=0)[[0, -1]]
            text += f", loss {first:.3g} → {last:.3g}"
        self.progress.update(self._bar, description=text)
        self._tell(text)

    def compiling(self, program: str) -> None:
        """A program is about to be compiled, or looked for among those that were."""
        self.progress.update(self._bar, description=f"{self._task}: compiling {program}")
        self._tell(f"{self._task}: compiling {program}")

    def merged(self) -> None:
        """All cells are done."""
        self.progress.update(self._bar, completed=self._total, refresh=True)

    def phase(self, description: str) -> None:
        """Something else begins."""
        self._task = description
        self.progress.update(self._bar, description=description, refresh=True)
        self._tell(description)

    def _tell(self, text: str) -> None:
        """With --verbose, a line for everything, with the seconds since the start."""
        if self._tells_all:
            show_line(self._console, f"nufilt: {time.monotonic() - self._begun:7.2f} s  {text}")


def show_warnings(console: Console, warnings: tuple[str, ...]) -> None:
    """One line each on stderr."""
    for warning in warnings:
        show_line(console, f"nufilt: warning: {printable(warning)}")


def show_result(console: Console, recipe: Recipe, out: str, *, is_told: bool = False) -> None:
    """What was merged and what was left, the steps as a table, the memory that took, and where the model is.

    Args:
      console: where to.
      recipe: of the merge.
      out: the output folder.
      is_told: whether what was merged and what was left stands above on the same terminal.
    """
    if not is_told:
        show_coverage(console, recipe.selected, recipe.left)
    is_done = bool(recipe.steps) and all(step.resumed for step in recipe.steps)
    columns: dict[str, list[str]] = {"step": [], "task": [], "seconds": [], "compiling": [], "solving": [], "loss": []}
    for number, step in enumerate(recipe.steps, 1):
        compiling, solving = step.timings.get("compile", 0.0), step.timings.get("solve")
        losses = [f"{loss:.4g}" for loss in step.losses[:1] + step.losses[-1:] if loss is not None]
        cells = [str(number), step.task + (" (resumed)" if step.resumed and not is_done else ""), f"{step.seconds:.2f}"]
        cells += ["", ""] if solving is None else [f"{compiling:.2f}", f"{max(0.0, solving - compiling):.2f}"]
        for column, cell in zip(columns.values(), [*cells, " → ".join(losses)], strict=True):
            column.append(cell)
    show_table(console, columns, texts=("task",))
    if (held := recipe.adapter) and held.energy_lost is not None:
        show_line(console, f"adapter of rank {held.rank}: {held.energy_lost:.2%} of the merge's energy is lost")
    if not is_done and (memory := recipe.memory) and memory.peak:  # no system but Linux tells
        show_line(console, f"memory  {memory.peak / 1e9:.2f} GB at most, {memory.planned / 1e9:.2f} GB planned")
    show_line(console, f"{'all is done: ' if is_done else ''}merged model: {out}")


def show_scores(console: Console, evaluation: Mapping[str, Any]) -> None:
    """Accuracies of every model on every task, in percent, with ACC, BWT and seconds."""
    from nufilt_jax.evaluation.metrics import of_examples  # with models, which no other command needs

    models, some = evaluation["models"], of_examples(evaluation.get("limit"))
    ends = {"ACC": True, "BWT": False, "compiling, s": True, "solving, s": True}
    rows = [*evaluation["tasks"], *ends]
    columns = {"": rows}
    for row in models:
        cells = [f"{100 * row['accuracy'][task]:.1f}" for task in evaluation["tasks"]]
        compiling = None if row.get("seconds") is None else row.get("compile") or 0.0
        solving = None if compiling is None else row["seconds"] - compiling
        cells += [f"{100 * row['acc']:.1f}", "" if row["bwt"] is None else f"{100 * row['bwt']:+.1f}"]
        cells += ["" if x is None else f"{x:.2f}" for x in (compiling, solving)]
        name = row["name"]
        while name in columns:
            name += " "
        columns[name] = cells
    known = [i for i in range(len(rows)) if any(column[i] for name, column in columns.items() if name)]
    kept = {name: [column[i] for i in known] for name, column in columns.items()}
    show_table(console, kept, title=f"accuracy{some}, %", texts=("",), section=len(evaluation["tasks"]))


def show_table(
    console: Console,
    columns: Mapping[str, list[str]],
    *,
    title: str | None = None,
    texts: tuple[str, ...] = (),
    section: int | None = None,
) -> None:
    """A table without its empty columns; what does not fit beside each other stands below, under the first column.

    Args:
      console: where to.
      columns: cells by head; no head twice.
      title: above it.
      texts: the heads of columns that are no numbers.
      section: a line follows this many rows.
    """
    first, *others = [head for head, cells in columns.items() if any(cells)]
    room = min(console.width, MOST_COLUMNS) - _cells(first, columns[first])
    parts: list[list[str]] = [[]]
    used = 0
    for head in others:
        width = _cells(head, columns[head])
        if parts[-1] and used + width > room:
            parts.append([])
            used = 0
        parts[-1].append(head)
        used += width
    for part in parts:
        look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "show_edge": False, "padding": (0, 1, 0, 0)}
        table = Table(title=title, title_justify="left", **look)
        for head in (first, *part):
            table.add_column(Text(_head(head)), justify="left" if head in texts else "right", overflow="fold")
        for index, cells in enumerate(zip(*(columns[head] for head in (first, *part)), strict=True), 1):
            table.add_row(*map(Text, cells), end_section=index == section)
        console.print(table)


def _head(head: str) -> str:
    """A long name over several lines."""
    return head.strip() if len(head) <= _LONG else head.strip().replace("_", "\n")


def _cells(head: str, cells: list[str]) -> int:
    """Width of a column, with the space around it."""
    return 2 + max(map(cell_len, [*_head(head).split("\n"), *cells]))
