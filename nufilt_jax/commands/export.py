"""The command `export`: parts of a finished merge in files that other programs read."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from nufilt_jax.commands import console as show
from nufilt_jax.commands.failures import traceback_beside, traceback_kept
from nufilt_jax.commands.verify import finished_merge
from nufilt_jax.config import problem
from nufilt_jax.engine.exports import export_delta, export_forecast, export_solve, export_tau
from nufilt_jax.errors import ConfigError, OutputError, Problem, raise_all
from nufilt_jax.output.recipe import Recipe

PARTS = ("tau", "delta", "forecast", "stablehlo")


def export(
    folder: Path, what: str, out: Path, step: int | None, stdout: Console, *, json: bool, quiet: bool, offline: bool
) -> int:
    """Writes one part of a finished merge.

    Args:
      folder: the output of the merge.
      what: `tau`, `delta`, `forecast` or `stablehlo`.
      out: the file to write, or for `stablehlo` the folder; nothing may stand there.
      step: counted from 1; None for the last, or for a forecast for all.
      stdout: gets the result.
      json: tell it as one JSON document.
      quiet: tell nothing.
      offline: use the local Hub cache alone.

    Raises:
      NufiltError: there is no finished merge, an option is refused, or the part cannot be read or written.
    """
    with finished_merge(folder) as (place, recipe):
        raise_all(ConfigError, _problems(recipe, what, step))
        if os.path.lexists(out):
            raise OutputError(Problem(str(out), "exists: nothing is overwritten", "choose another --out, or remove it"))
        out = Path(os.path.abspath(out))
        with traceback_kept(traceback_beside(out)):
            count = _write(recipe, place, what, out, step, offline=offline)
    document: dict[str, Any] = {"folder": str(place), "what": what, "out": str(out), "step": step, "count": count}
    if json:
        show.show_json(stdout, document)
    elif not quiet:
        kind = {"forecast": "rows", "stablehlo": "modules"}.get(what, "tensors")
        show.show_line(stdout, f"{what}: {count} {kind} in {out}")
    return 0


def _problems(recipe: Recipe, what: str, step: int | None) -> list[Problem]:
    if what not in PARTS:
        return [problem("what", f"must be one of {', '.join(PARTS)}, got {what!r}")]
    last = len(recipe.steps)
    if step is None:
        return []
    if what == "stablehlo":
        return [problem("step", f"{what} is of no step", "leave it out")]
    if not 1 <= step <= last:
        return [problem("step", f"must be from 1 to {last}, the steps of this merge, got {step}")]
    if what == "delta" and step != last:
        first = "task" if step == 1 else f"{step} tasks"
        fix = f"merge the first {first} into another folder"
        return [problem("step", f"the state of this merge is that after step {last}, got {step}", fix)]
    return []


def _write(recipe: Recipe, folder: Path, what: str, out: Path, step: int | None, *, offline: bool) -> int:
    if what == "tau":
        return export_tau(recipe, folder, step or len(recipe.steps), out, offline=offline)
    if what == "delta":
        return export_delta(recipe, folder, out, offline=offline)
    if what == "forecast":
        return export_forecast(folder, step, out)
    return export_solve(recipe, folder, out, offline=offline)
