"""The recipe of an output folder as a configuration file: the options that repeat the merge."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nufilt_jax.engine.job import read_recipe
from nufilt_jax.output.model import Model
from nufilt_jax.output.recipe import Recipe
from nufilt_jax.strict_json import JsonError, parse_object


def options_of_recipe(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The options of the merge that a `nufilt.json` records; without --out, it goes to a new folder, `NAME-again`.

    Raises:
      OutputError: the recipe is damaged.
    """
    folder = path.absolute().parent
    recipe = read_recipe(document, folder)
    settings = recipe.settings
    config = {key: value for key, value in settings.to_json()["config"].items() if key not in settings.config.idle}
    folders = {str(Path(step.examples["file"]).parent) for step in recipe.steps if step.examples}
    options: dict[str, Any] = {
        "base": _spelt(recipe.base),
        "tasks": {task.name: _spelt(task) for task in recipe.tasks},
        "method": settings.method,
        "method_args": config,
        "data": folders.pop() if len(folders) == 1 else None,  # of several, the user has to make one
        "out": f"{folder.name}-again",
    }
    named = ("seed", "layers", "other_params", "format", "dtype", "output", "adapter_out_rank")
    options |= {name: getattr(settings, name) for name in named}
    options["out"] = str(Path.cwd() / options["out"])
    return options | ({"conv": True} if settings.conv else {})


def is_recipe(document: Mapping[str, Any]) -> bool:
    """Whether a document is a recipe, of the first version too, which does not say so."""
    return "recipe_version" in document or {"base", "tasks", "config", "steps"} <= document.keys()


def promised(path: Path | None) -> dict[tuple[str, str | None], Model]:
    """The models of a recipe given as --config, with their hashes, by source and revision; none of another file."""
    if path is None or path.suffix.lower() != ".json":
        return {}
    try:
        document = parse_object(path.read_bytes())
    except (OSError, JsonError):  # which the options were read from a moment ago
        return {}
    return _by_place(read_recipe(document, path.absolute().parent)) if is_recipe(document) else {}


def _by_place(recipe: Recipe) -> dict[tuple[str, str | None], Model]:
    return {(model.source, model.revision): model for model in (recipe.base, *recipe.tasks)}


def _spelt(model: Model) -> str:
    return model.source + (f"@{model.revision}" if model.revision else "")
