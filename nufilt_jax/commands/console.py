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

from nufilt_jax.anatomy import FLAT
from nufilt_jax.commands.text import show_json as show_json
from nufilt_jax.commands.text import show_line as show_line
from nufilt_jax.engine.coverage import coverage, coverage_lines
from nufilt_jax.engine.plan import Plan
from nufilt_jax.errors import printable
from nufilt_jax.methods.state import LayerReport
from nufilt_jax.output.facts import Covered
from nufilt_jax.output.recipe import Recipe

MOST_COLUMNS = 80  # of a table, however wide the terminal
_LONG = 10  # characters of a column's head that stay on one line
QUIET_SECONDS = 30.0  # for so long nothing is said on what is no terminal: scripts take a line there for a warning


class ProgressWatcher:
    """A bar on stderr with the cell, the stack just solved and its loss; in a log, a line per cell of a long run."""

    def __init__(self, console: Console, *, quiet: bool, verbose: bool = False) -> None:
        """Takes stderr.

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
        self._tells_all = verbose
        self._bar = self.progress.add_task("reading", total=None)
        self._task = "reading"

    def head(self, plan: Plan, selected: Iterable[Covered], left: Iterable[Covered]) -> None:
        """What will be merged, and in which windows; on no terminal it is told with the results."""
        if not self.progress.disable:
            for line in (*map(printable, coverage_lines(selected, left)), *grid_lines(plan)):
                show_line(self._console, line)

    def cell(self, task: str, window: str, done: int, total: int) -> None:
        """A cell begins, after `done` of `total`."""
        self._task = f"{task}, {window} ({done + 1} of {total})" if window else f"{task} ({done + 1} of {total})"
        # Drawn at once: a cell may be over before the bar would move by itself.
        self.progress.update(self._bar, description=self._task, completed=done, total=total, refresh=True)
        if self._tells_lines and not self._tells_all and time.monotonic() - self._begun > QUIET_SECONDS:
            show_line(self._console, f"nufilt: {self._task}")
        self._tell(self._task)

    def stack(self, description: str, report: LayerReport) -> None:
        """A group of layers is solved."""
        text = f"{self._task}: {description}"
        if report.losses.shape[-1]:
            first, last = np.asarray(report.losses).sum(axis=0)[[0, -1]]
            text += f", loss {first:.3g} → {last:.3g}"
        self.progress.update(self._bar, description=text)
        self._tell(text)

    def compiling(self, program: str) -> None:
        """A program is about to be compiled, or looked for among those that were."""
        self.progress.update(self._bar, description=f"{self._task}: compiling {program}")
        self._tell(f"{self._task}: compiling {program}")

    def phase(self, description: str) -> None:
        """Something else begins."""
        self._task = description
        self.progress.update(self._bar, description=description)
        self._tell(description)

    def _tell(self, text: str) -> None:
        """With --verbose, a line for everything, with the seconds since the start."""
        if self._tells_all:
            show_line(self._console, f"nufilt: {time.monotonic() - self._begun:7.2f} s  {text}")


def show_warnings(console: Console, warnings: tuple[str, ...]) -> None:
    """One line each on stderr."""
    for warning in warnings:
        show_line(console, f"nufilt: warning: {printable(warning)}")


def plan_document(plan: Plan, estimate: Mapping[str, Any]) -> dict[str, Any]:
    """A plan as JSON, with what it will take."""
    selected, left = coverage(plan, {})
    return {
        "out": None if plan.out is None else str(plan.out),
        "base": {"source": plan.base.source, "revision": plan.base.revision, "format": plan.base.format},
        "tasks": [
            {"name": source.name, "source": source.source, "revision": source.revision, "done": index < plan.done}
            for index, source in enumerate(plan.sources)
        ],
        **plan.settings.to_json(),
        "layers_selected": [layer.removesuffix(FLAT) for layer in plan.selection.layers],
        "selected": [row.to_json() for row in selected],
        "left": [row.to_json() for row in left],
        "other_touched": len(plan.selection.other),
        "kept_from_base": len(plan.base.tensors) - len(plan.selection.touched),
        "stacks": [{"layers": n_layers, "shape": list(shape)} for shape, n_layers in _stacks(plan).items()],
        "windows": [row.told(row.done).to_json() for row in plan.rows],
        "memory": plan.memory.told().to_json(),
        **estimate,
        "warnings": list(plan.warnings),
    }


def _stacks(plan: Plan) -> dict[tuple[int, ...], int]:
    """How many layers of each shape the method works on."""
    found: dict[tuple[int, ...], int] = {}
    for stack in plan.stacks:
        found[stack.shape] = found.get(stack.shape, 0) + len(stack.layers)
    return found


def grid_lines(plan: Plan) -> list[str]:
    """In how many windows a merge is done, and the memory that takes."""
    memory, n_rows = plan.memory, len(plan.rows)
    told = "allowed by --max-memory" if memory.is_asked_for else "are half of what is free"
    largest = max(row.n_bytes for row in plan.rows) / 1e9
    rows = "one window" if n_rows == 1 else f"{n_rows} windows of at most {largest:.2f} GB"
    return [
        f"grid    {rows} x {len(plan.sources)} tasks, {plan.walk} first",
        f"memory  about {memory.planned / 1e9:.2f} GB at most; {memory.allowed / 1e9:.2f} GB {told}",
    ]


def estimate_lines(estimate: Mapping[str, Any]) -> list[str]:
    """What a merge will take of the disk and of time."""
    n_bytes, disk, seconds = (estimate[key] for key in ("bytes", "disk", "seconds"))
    fetched = f", {n_bytes['fetch'] / 1e9:.2f} GB of it fetched" if n_bytes["fetch"] else ""
    merging = "time unknown for merging" if seconds["merging"] is None else f"{seconds['merging']:.0f} s merging"
    compiling = "" if not seconds["compiling"] else f", and up to {seconds['compiling']:.0f} s of compiling"
    return [
        f"read    {n_bytes['read'] / 1e9:.2f} GB{fetched}",
        f"disk    {disk['needed'] / 1e9:.2f} GB for model and state; {disk['free'] / 1e9:.2f} GB are free",
        f"time    about {seconds['files']:.0f} s on files, {merging}{compiling}",
    ]


def show_plan(console: Console, plan: Plan, estimate: Mapping[str, Any]) -> None:
    """A plan as tables."""
    document = plan_document(plan, estimate)
    settings = ", ".join(f"{k} {v}" for k, v in document["config"].items()) or "no settings"
    lines = [
        f"base    {plan.base.source}" + (f" at {plan.base.revision}" if plan.base.revision else ""),
        f"method  {plan.settings.method} ({settings}), seed {plan.settings.seed}",
        f"layers  {len(plan.selection.layers)} merged by the method, {len(plan.selection.other)} other tensors "
        f"moved ({plan.settings.other_params}), {document['kept_from_base']} kept from the base",
        *(f"        {row['layers']} of shape {row['shape']}" for row in document["stacks"]),
        *map(printable, coverage_lines(*(map(Covered.from_json, document[part]) for part in ("selected", "left")))),
        *grid_lines(plan),
        *estimate_lines(estimate),
        *([f"out     {plan.out}"] if plan.out else []),
    ]
    lines += [
        f"step {number:<3} {task['name']}: {task['source']}" + (" (done)" if task["done"] else "")
        for number, task in enumerate(document["tasks"], 1)
    ]
    for line in lines:
        show_line(console, line)


def show_result(console: Console, recipe: Recipe, out: str) -> None:
    """What was merged and what was left, the steps as a table, the memory that took, and where the model is."""
    for line in map(printable, coverage_lines(recipe.selected, recipe.left)):
        show_line(console, line)
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
    models, limit = evaluation["models"], evaluation.get("limit")
    some = "" if limit is None else f" of at most {limit} examples"
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
