"""The command `verify`: whether a merge is what its recipe says."""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from nufilt_jax.commands import console as show
from nufilt_jax.commands.failures import traceback_beside, traceback_kept
from nufilt_jax.engine.job import finished_recipe
from nufilt_jax.engine.records import device_entry
from nufilt_jax.engine.sameness import TOLERANCE, Comparison
from nufilt_jax.engine.verification import Verification, differences_from, refused, verify_hashes, verify_numbers
from nufilt_jax.errors import NufiltError, OutputError, Problem
from nufilt_jax.output.place import RECIPE, OutputPlace
from nufilt_jax.output.recipe import Recipe


class VerificationError(NufiltError, ValueError):
    """An output is not what its recipe says, or an input not what it was."""


@contextlib.contextmanager
def finished_merge(folder: Path) -> Iterator[tuple[Path, Recipe]]:
    """The place and the recipe of a finished merge, which no other run writes to meanwhile.

    Raises:
      OutputError: there is none, its recipe is damaged, or another run is writing there.
    """
    place = OutputPlace(folder)
    if not (place.out / RECIPE).is_file():
        raise OutputError(Problem(str(folder), "holds no finished merge", "give the output folder of a merge"))
    with place.read_locked():
        yield place.out, finished_recipe(place.out)


def verify(
    folder: Path, stdout: Console, stderr: Console, *, quick: bool, json: bool, quiet: bool, offline: bool
) -> int:
    """Compares a finished merge with its recipe, and says what does not hold.

    Args:
      folder: the output of a merge.
      stdout: gets the result.
      stderr: gets the progress.
      quick: compare hashes alone, and do not merge again.
      json: tell the result as one JSON document.
      quiet: tell nothing but what does not hold.
      offline: use the local Hub cache alone.

    Returns:
      0: everything holds.

    Raises:
      VerificationError: something does not, all of it listed.
      OutputError: there is no finished merge, or another run is writing there.
    """
    watcher = show.ProgressWatcher(stderr, quiet=quiet or json)
    with finished_merge(folder) as (out, recipe), traceback_kept(traceback_beside(out)), watcher.progress:
        watcher.phase("hashing inputs and outputs")
        found = verify_hashes(recipe, out, offline=offline)
        if not quick:
            found.differences = differences_from(recipe, device_entry())
            if all(found.inputs.values()):
                found.comparison = _merged_again(recipe, out, found, watcher, offline=offline)
    if json:
        show.show_json(stdout, {"out": str(out), "quick": quick, **found.to_json()})
    elif not quiet:
        for line in _lines(found, quick=quick):
            show.show_line(stdout, line)
    if found.problems:
        raise VerificationError(*found.problems)
    return 0


def _merged_again(
    recipe: Recipe, out: Path, found: Verification, watcher: show.ProgressWatcher, **how: Any
) -> Comparison | None:
    with _scratch(out) as scratch:
        try:
            compared = verify_numbers(recipe, out, Path(scratch), watcher, is_exact=not found.differences, **how)
        except NufiltError as error:
            found.problems += refused(error)
            return None
    found.problems += compared.problems
    return compared


def _scratch(out: Path) -> tempfile.TemporaryDirectory[str]:
    """A passing folder: where TMPDIR says, else beside the output, whose disk has held such a merge before."""
    beside = out.parent if os.access(out.parent, os.W_OK) and not os.environ.get("TMPDIR") else None
    return tempfile.TemporaryDirectory(prefix="nufilt-verify-", dir=beside)


def _lines(found: Verification, *, quick: bool) -> list[str]:
    """What was compared; what does not hold follows on stderr."""
    n_held = sum(found.inputs.values())
    lines = [f"inputs  {n_held} of {len(found.inputs)} are what they were", f"files   {found.files} were hashed"]
    if found.differences:
        changed = ", ".join(f"{what} (then {then}, now {now})" for what, then, now in found.differences)
        lines.append(f"since   {changed}: bits may differ, and {TOLERANCE:g} of an update per task is allowed")
    if compared := found.comparison:
        worst = f"; at most {compared.worst:.2g} of an update apart" if 0 < compared.worst < math.inf else ""
        lines.append(f"again   {compared.identical} of {compared.tensors} tensors are the same in every bit{worst}")
    elif not quick:
        lines.append("again   not merged: see the lines on stderr")
    lines += [f"note    {note}" for note in found.notes]
    return [*lines, "not verified" if found.problems else "verified"]
