"""Reading a recipe back, and what keeps a command from going on with the merge that it describes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nufilt_jax.config import problem
from nufilt_jax.engine.job import Recorded, Settings, Source
from nufilt_jax.errors import ConfigError, OutputError, Problem
from nufilt_jax.methods import find
from nufilt_jax.output.place import OutputPlace

SETTINGS = ("method", "config", "seed", "layers", "other_params", "format", "dtype")


def current(place: OutputPlace) -> Recorded | None:
    """The merge under way beside an output folder, else the finished one in it, else None.

    Raises:
      OutputError: something else stands in the folder, or the recipe is damaged.
    """
    finished = place.finished()
    if (recipe := place.unfinished()) is not None:
        return read_recipe(recipe, place.partial)
    return None if finished is None else read_recipe(finished, place.out)


def read_recipe(recipe: Mapping[str, Any], folder: Path) -> Recorded:
    """Checks that a recipe holds what going on needs.

    Raises:
      OutputError: it is damaged, or from a version with other settings.
    """
    try:
        values: dict[str, Any] = {key: recipe[key] for key in SETTINGS} | {"conv": recipe.get("conv", False)}
        config = find(values["method"]).config(**values.pop("config"))
        recorded = Recorded(
            folder=folder,
            base=_source("base", recipe["base"]),
            tasks=tuple(_source(task["name"], task) for task in recipe["tasks"]),
            settings=Settings(config=config, **values),
            steps=tuple(dict(step) for step in recipe["steps"]),
        )
        names = [task.name for task in recorded.tasks]
        if [step["task"] for step in recorded.steps] != names[: recorded.done]:
            raise ValueError("its steps are not those of its tasks")
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        what = f"the recipe nufilt.json is damaged or of another version: {reason}"
        raise OutputError(Problem(str(folder), what, "merge again into another folder")) from error
    return recorded


def _source(name: str, entry: Mapping[str, Any]) -> Source:
    return Source(name, str(entry["source"]), entry["revision"], dict(entry["sha256"]))


_OF_WRITING = ("format", "dtype")


def other_merge_problems(
    recorded: Recorded, settings: Settings, names: list[str], *, is_written: bool
) -> list[Problem]:
    """The settings and task names in which a command differs from the merge that stands in its output folder.

    Args:
      recorded: the merge there.
      settings: the command's.
      names: of the command's tasks.
      is_written: whether the model is there; if not, it may still be written in another format or type.
    """
    there, here = recorded.settings.as_dict(), settings.as_dict()
    configs = there.pop("config"), here.pop("config")
    pairs = [(key, there[key], here[key]) for key in here if is_written or key not in _OF_WRITING]
    if there["method"] == here["method"]:
        pairs += [(key, *(config.get(key) for config in configs)) for key in configs[1]]
    pairs.append(("task", ", ".join(task.name for task in recorded.tasks), ", ".join(names)))
    fix = f"choose another --out, remove {recorded.folder}, or continue it with --add"
    return [
        problem(key, f"is {old!r} in the merge in {recorded.folder}, got {new!r}", fix)
        for key, old, new in pairs
        if old != new
    ]


def other_weights_problem(where: str, then: Mapping[str, str], now: Mapping[str, str], folder: Path) -> Problem | None:
    """Says that a model's files are not those that the merge in `folder` was begun with.

    Args:
      where: the model.
      then: SHA-256 by file name, from the recipe.
      now: the same, of the files as they are.
      folder: where the recipe stands.
    """
    changed = sorted(name for name in {**then, **now} if then.get(name) != now.get(name))
    if not changed:
        return None
    pairs = "; ".join(f"{name} had SHA-256 {then.get(name)} and has {now.get(name)}" for name in changed)
    fix = "restore the files, or merge into another folder"
    return Problem(where, f"has changed since the merge in {folder} began: {pairs}", fix)
