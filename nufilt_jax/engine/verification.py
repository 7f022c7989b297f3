"""A finished merge held against its recipe: its inputs and files by their hashes, its numbers by merging again."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nufilt_jax.checkpoints import open_checkpoint
from nufilt_jax.checkpoints.peft.config import CONFIG
from nufilt_jax.engine.inspection import inspect
from nufilt_jax.engine.job import Job
from nufilt_jax.engine.plan import make_plan
from nufilt_jax.engine.records import layers_then, this_host, version_entry
from nufilt_jax.engine.run import run
from nufilt_jax.engine.sameness import Comparison, compare, has_state, loss_problems
from nufilt_jax.engine.timing import Clock
from nufilt_jax.engine.watching import Watcher
from nufilt_jax.errors import NufiltError, Problem, gathering
from nufilt_jax.linalg.dispatch import at_once
from nufilt_jax.methods import find
from nufilt_jax.output.hashes import changed_files
from nufilt_jax.output.place import CARD, STATE, OutputPlace
from nufilt_jax.output.recipe import Model, Recipe

_RESTORE = "restore the files: the merge cannot be verified without them"
_OF_HOST = ("machine", "processor")


@dataclasses.dataclass(kw_only=True)
class Verification:
    """What was looked at, and what does not hold.

    Attributes:
      inputs: of each model and file that went in, whether it is what it was.
      files: number of the output's files that were hashed.
      notes: what is not as the merge left it, and need not be.
      differences: of versions, device and host from those of the merge, as `(what, then, now)`.
      comparison: of the numbers with those of merging again; None if that was not done.
      problems: everything that does not hold.
    """

    inputs: dict[str, bool] = dataclasses.field(default_factory=dict)
    files: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)
    differences: list[tuple[str, Any, Any]] = dataclasses.field(default_factory=list)
    comparison: Comparison | None = None
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As `nufilt verify --json` tells it."""
        return {
            "holds": not self.problems,
            "inputs": self.inputs,
            "files": self.files,
            "notes": self.notes,
            "bit_for_bit": not self.differences,
            "differences": [{"what": what, "then": then, "now": now} for what, then, now in self.differences],
            "recomputed": None if self.comparison is None else self.comparison.to_json(),
            "problems": [str(problem) for problem in self.problems],
        }


def verify_hashes(recipe: Recipe, folder: Path, *, offline: bool = False) -> Verification:
    """Reads all inputs and outputs of a merge, and compares their hashes with those of its recipe.

    Args:
      recipe: of the merge.
      folder: where it stands.
      offline: use the local Hub cache alone.
    """
    files = dict(recipe.files)
    found = Verification()
    if not recipe.files:
        what = "its recipe holds no hashes of its files"
        found.problems.append(Problem(str(folder), what, "it was made by an earlier version: merge again"))
    if not has_state(folder):
        files = {name: digest for name, digest in files.items() if not name.startswith(f"{STATE}/")}
        found.notes.append(
            f"{STATE}/ is not there, as in a folder that was pushed without it: the model alone is verified"
        )
    found.files = len(files)
    for problem in changed_files(folder, files):
        if problem.where == str(folder / CARD):
            found.notes.append(f"{CARD} {problem.what}: a model card is its user's to edit")
        else:
            found.problems.append(problem)
    for name, problems in _inputs(recipe, folder, offline=offline):
        found.inputs[name] = not problems
        found.problems += problems
    return found


def _inputs(recipe: Recipe, folder: Path, *, offline: bool) -> Iterator[tuple[str, list[Problem]]]:
    for model in (recipe.base, *recipe.tasks):
        problems: list[Problem] = []
        with gathering(problems):
            opened = open_checkpoint(model.source, revision=model.revision, offline=offline, adapters=True)
            problems += model.changes(opened.sha256_as(model.sha256 or {}), model.source, folder)
        yield model.name, [problem._replace(fix=problem.fix or _RESTORE) for problem in problems]
    for step in recipe.steps:
        if step.examples is not None:
            path = Path(step.examples["file"])
            yield f"{step.task}: examples", changed_files(path.parent, {path.name: step.examples["sha256"]})


def differences_from(recipe: Recipe, device: str) -> list[tuple[str, Any, Any]]:
    """In what this process differs from the one that merged, of all that bits depend on; empty if in nothing.

    Args:
      recipe: of the merge.
      device: of this process, as `engine.records.device_entry` tells it.
    """
    here, now = this_host(), version_entry()
    pairs = [(name, recipe.versions.get(name), now.get(name)) for name in sorted({*recipe.versions, *now})]
    pairs += [("device", recipe.device, device)]
    pairs += [(name, getattr(recipe.host, name), getattr(here, name)) for name in _OF_HOST]
    pairs += [("hosts", "several", "one")] if recipe.host.is_mixed else []
    pairs += [("commands", "several", "one")] if _knew_of_fewer(recipe) else []
    return [(what, then, now) for what, then, now in pairs if then != now]


def _knew_of_fewer(recipe: Recipe) -> bool:
    """Whether layers may have been in factors that are whole when all tasks are known from the start, or wider ones."""
    adapters = (CONFIG in map(os.path.basename, task.sha256 or ()) for task in recipe.tasks)
    return find(recipe.settings.method).in_factors and any(step.resumed for step in recipe.steps) and any(adapters)


def verify_numbers(
    recipe: Recipe, folder: Path, scratch: Path, watcher: Watcher, *, is_exact: bool, offline: bool = False
) -> Comparison:
    """Merges again, and compares every tensor of the model and of its state, and the losses of every step.

    Args:
      recipe: of the merge, whose inputs are what they were.
      folder: where it stands.
      scratch: an empty folder, with room for a second merge.
      watcher: is told of every cell and stack.
      is_exact: whether the bits must be the same; if not, the tolerance of `sameness` counts.
      offline: use the local Hub cache alone.

    Raises:
      NufiltError: the merge cannot be done again.
    """
    job = Job(
        base=_plain(recipe.base),
        sources=tuple(map(_plain, recipe.tasks)),
        settings=recipe.settings,
        out=scratch / "again",
        data=_examples(recipe, scratch),
    )
    place = OutputPlace(scratch / "again")
    with at_once(layers_then(recipe.host)), place.locked():
        plan = make_plan(job, offline=offline)
        again = run(plan, inspect(plan), place, watcher, Clock())
    found = compare(folder, place.out, plan.base, len(recipe.tasks), watcher.phase, is_exact=is_exact)
    found.problems += loss_problems(folder, recipe.steps, again.steps, is_exact=is_exact)
    return found


def _plain(model: Model) -> Model:
    """As a command would name it."""
    return dataclasses.replace(model, sha256=None)


def _examples(recipe: Recipe, scratch: Path) -> Path | None:
    """A folder with the files that the method learned from, which may come from several."""
    files: Mapping[str, str] = {step.task: step.examples["file"] for step in recipe.steps if step.examples}
    if not files:
        return None
    folder = scratch / "examples"
    folder.mkdir()
    for task, file in files.items():
        (folder / f"{task}.safetensors").symlink_to(os.path.abspath(file))
    return folder


def refused(error: NufiltError) -> Iterable[Problem]:
    """What a merge that could be done then is refused for now."""
    for problem in error.problems:
        yield problem._replace(what=f"merging again is refused: {problem.what}")
