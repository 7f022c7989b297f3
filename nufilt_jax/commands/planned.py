"""What a plan says: as one JSON document, and as lines for people."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from nufilt_jax.anatomy import FLAT
from nufilt_jax.commands.text import show_line, show_wrapped
from nufilt_jax.engine.coverage import coverage, coverage_lines
from nufilt_jax.engine.plan import Plan
from nufilt_jax.errors import printable
from nufilt_jax.output.facts import Covered
from nufilt_jax.presets import TINY


def plan_document(plan: Plan, estimate: Mapping[str, Any], passing: Path | None = None) -> dict[str, Any]:
    """A plan as JSON, with what it will take.

    Args:
      plan: of a merge.
      estimate: what that will take.
      passing: the folder where built-in checkpoints stand for as long as this command runs.
    """
    selected, left = coverage(plan, {})
    return {
        "out": None if plan.out is None else str(plan.out),
        "base": {
            "source": _lasting(plan.base.source, passing),
            "revision": plan.base.revision,
            "format": plan.base.format,
        },
        "tasks": [
            {
                "name": source.name,
                "source": _lasting(source.source, passing),
                "revision": source.revision,
                "done": index < plan.done,
            }
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


def _lasting(source: str, passing: Path | None) -> str:
    """A source by a name that means something tomorrow."""
    is_built_in = passing is not None and Path(source).is_relative_to(passing)
    return f"{TINY}/{Path(source).name} (built in)" if is_built_in else source


def show_coverage(console: Console, selected: Iterable[Covered], left: Iterable[Covered]) -> None:
    """What is merged and what is left."""
    for line in map(printable, coverage_lines(selected, left)):
        show_wrapped(console, line)


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
    compiling = "" if not seconds["compiling"] else f", and {seconds['compiling']:.0f} s compiling what is new"
    return [
        f"read    {n_bytes['read'] / 1e9:.2f} GB{fetched}",
        f"disk    {disk['needed'] / 1e9:.2f} GB for model and state; {disk['free'] / 1e9:.2f} GB are free",
        f"time    about {seconds['files']:.0f} s on files, {merging}{compiling}",
    ]


def show_plan(console: Console, plan: Plan, estimate: Mapping[str, Any], passing: Path | None = None) -> None:
    """A plan as lines; see `plan_document`. Those with paths are never wrapped: they can be copied."""
    document = plan_document(plan, estimate, passing)
    settings = ", ".join(f"{k} {v}" for k, v in document["config"].items()) or "no settings"
    show_line(
        console,
        f"base    {document['base']['source']}" + (f" at {plan.base.revision}" if plan.base.revision else ""),
    )
    lines = [
        f"method  {plan.settings.method} ({settings}), seed {plan.settings.seed}",
        f"layers  {len(plan.selection.layers)} merged by the method, {len(plan.selection.other)} other tensors "
        f"moved ({plan.settings.other_params}), {document['kept_from_base']} kept from the base",
        *(f"        {row['layers']} of shape {row['shape']}" for row in document["stacks"]),
    ]
    for line in lines:
        show_wrapped(console, line)
    show_coverage(console, *(map(Covered.from_json, document[part]) for part in ("selected", "left")))
    for line in (*grid_lines(plan), *estimate_lines(estimate)):
        show_wrapped(console, line)
    if plan.out:
        show_line(console, f"out     {plan.out}")
    for number, task in enumerate(document["tasks"], 1):
        done = " (done)" if task["done"] else ""
        show_line(console, f"step {number:<3} {task['name']}: {task['source']}{done}")
