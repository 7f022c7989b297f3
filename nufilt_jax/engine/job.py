"""What a command asks for, before any checkpoint is opened."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nufilt_jax.config import ComputeType, differing, problem
from nufilt_jax.errors import ConfigError, OutputError, Problem
from nufilt_jax.methods import find
from nufilt_jax.output.documents import read_json
from nufilt_jax.output.place import RECIPE, STATE, OutputPlace
from nufilt_jax.output.recipe import Model, Recipe, Settings
from nufilt_jax.output.stored import Stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How models are evaluated.

    Attributes:
      tasks_file: describes tasks beside those that are known.
      heads_from: the CLIP model whose text tower makes the zero-shot heads; None for that of the model itself.
      limit: at most so many examples of each task; None for all.
      dtype: in which the forward passes compute.
      offline: use the local caches of the Hub alone.
    """

    tasks_file: Path | None = None
    heads_from: str | None = None
    limit: int | None = None
    dtype: ComputeType = "float32"
    offline: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
    """A merge under way or finished, as its folder tells.

    Attributes:
      folder: where its recipe stands: the output folder, or the partial one beside it.
      recipe: with hashes of all models, the tasks not merged yet included.
      stored: the windows of its grid that are on disk.
      is_written: whether the folder is the finished one.
    """

    folder: Path
    recipe: Recipe
    stored: Stored
    is_written: bool

    @property
    def done(self) -> int:
        """Number of tasks merged into all layers."""
        if self.is_written:
            return len(self.recipe.steps)
        return self.stored.least if len(self.stored.layers) >= self.recipe.n_layers else 0

    @property
    def has_begun(self) -> bool:
        """Whether anything of it is kept, so that another command may not take its place."""
        return self.is_written or bool(self.stored.layers)


def recorded_in(place: OutputPlace) -> Recorded | None:
    """The merge under way beside an output folder, else the finished one in it, else None.

    Raises:
      OutputError: something else stands in the folder, or the recipe is damaged.
    """
    finished, unfinished = place.finished(), place.unfinished()
    document, folder = (finished, place.out) if unfinished is None else (unfinished, place.partial)
    if document is None:
        return None
    recipe = read_recipe(document, folder, is_finished=unfinished is None)
    return Recorded(folder=folder, recipe=recipe, stored=Stored(place.windows()), is_written=unfinished is None)


def finished_recipe(folder: Path) -> Recipe:
    """The recipe of the finished merge in a folder.

    Raises:
      OutputError: as `read_recipe` does, or it cannot be read.
    """
    return read_recipe(read_json(folder / RECIPE), folder, is_finished=True)


def read_recipe(document: Mapping[str, Any], folder: Path, *, is_finished: bool = False) -> Recipe:
    """The recipe in a folder.

    Args:
      document: what its file holds.
      folder: where that stands.
      is_finished: whether it is of a merge that is done, so that steps that are missing are damage.

    Raises:
      OutputError: it is damaged, of another version, or of a rule that nobody has imported.
    """
    method = document.get("method")
    if isinstance(method, str) and ":" in method:
        try:
            find(method)
        except ConfigError as error:
            what = f"was merged by {method}, and a recipe imports nothing"
            fix = f"it is a rule of your own: say --method {method}"
            raise OutputError(Problem(str(folder), what, fix)) from error
    return Recipe.from_json(document, folder, lambda method: find(method).config, is_finished=is_finished)


def lacking_state(recipe: Recipe, stored: Stored, folder: Path) -> list[Problem]:
    """Refuses a state that is not there, or lacks layers of its recipe.

    Args:
      recipe: of the merge.
      stored: its state.
      folder: with both.
    """
    there, merged = len(stored.layers), max(1, recipe.n_layers)
    if there >= merged:
        return []
    fix = "copy it from where the model was merged (push leaves it out without --with-state), or merge again"
    return [Problem(str(folder / STATE), f"holds {there} of the {merged} layers that were merged", fix)]


class Agreed(NamedTuple):
    """What the processes of a run plan with alike, so that all have the same windows.

    Attributes:
      processes: their number.
      free: bytes that each may take if no cap is given; None for half of what is free.
    """

    processes: int = 1
    free: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A command, understood.

    Attributes:
      base: the backbone.
      sources: all tasks in order, those that `continues` has merged included.
      settings: how; a refused value is replaced by its default, so that the search for problems can go on.
      out: the output folder; None if only a plan is wanted.
      data: folder with examples of each task; None if there is none.
      evaluation: how the merged model is evaluated after every step; None if it is not.
      max_memory: bytes that the run may take; None for half of what is free.
      devices: so many of this process share the layers of a window.
      agreed: what all processes of the run plan with.
      strict: refuse tasks of which a head or a table would stay the base's.
      continues: the merge that --add continues: of the tasks that it has merged, no file is needed.
      warnings: what the user should know and may accept.
      problems: what is wrong so far.
    """

    base: Model
    sources: tuple[Model, ...]
    settings: Settings
    out: Path | None
    data: Path | None = None
    evaluation: EvaluationOptions | None = None
    max_memory: int | None = None
    devices: int = 1
    agreed: Agreed = dataclasses.field(default_factory=Agreed)
    strict: bool = False
    continues: Recorded | None = None
    warnings: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def n_merged(self) -> int:
        """Number of leading tasks whose files are not needed."""
        return self.continues.done if self.continues else 0


def other_merge_problems(
    recipe: Recipe, folder: Path, settings: Settings, names: list[str], *, is_written: bool
) -> list[Problem]:
    """Refuses a command that differs from the merge that stands in its output folder, difference by difference."""
    fix = f"choose another --out, remove {folder}, or continue it with --add"
    return [
        problem(key, differing(old, new, f"in the merge in {folder}"), fix)
        for key, old, new in recipe.differences(settings, names, is_written=is_written)
    ]
