"""The command `analyze`: what a finished merge did, in numbers, pictures and one HTML page."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from nufilt_jax import methods
from nufilt_jax.analysis.document import Measured, make_document
from nufilt_jax.analysis.layers import WHOLE_MODEL
from nufilt_jax.analysis.pictures import draw_pictures
from nufilt_jax.analysis.report import Told, report_page
from nufilt_jax.checkpoints import Checkpoint, fit, open_checkpoint, open_task
from nufilt_jax.commands import console as show
from nufilt_jax.commands.arguments import AnalyzeArguments
from nufilt_jax.commands.failures import traceback_beside, traceback_kept
from nufilt_jax.commands.measured import measure
from nufilt_jax.config import problem
from nufilt_jax.durable import atomic_write
from nufilt_jax.engine.evaluation import EVALUATION
from nufilt_jax.engine.job import finished_recipe
from nufilt_jax.engine.tiny import built_in_family
from nufilt_jax.errors import (
    CheckpointError,
    ConfigError,
    MissingExtraError,
    NufiltError,
    OutputError,
    Problem,
    printable,
    raise_all,
)
from nufilt_jax.evaluation import accuracy_matrix
from nufilt_jax.evaluation.clip.images import TaskImages, read_task_images
from nufilt_jax.evaluation.metrics import of_examples
from nufilt_jax.evaluation.specs import Spec, load_specs
from nufilt_jax.methods.stacked import Params
from nufilt_jax.models import parse_vision_config
from nufilt_jax.output.documents import read_forecast, read_json, read_scores, write_json
from nufilt_jax.output.place import FORECAST, RECIPE, OutputPlace
from nufilt_jax.output.recipe import Model, Recipe
from nufilt_jax.zoo import draw
from nufilt_jax.zoo.families import IMAGE_MEAN, IMAGE_STD

_LOST = "lost by earlier_tasks, points"  # of a percent, as accuracies are shown
ANALYSIS, REPORT, PICTURES = "analysis.json", "report.html", "analysis"


def analyze(folder: Path, arguments: AnalyzeArguments, stdout: Console, stderr: Console) -> int:
    """Writes `analysis.json`, `report.html` and the pictures into an output folder.

    Raises:
      NufiltError: there is no finished merge, or it cannot be written to.
    """
    if arguments.images < 1:
        raise ConfigError(problem("images", f"must be at least 1, got {arguments.images}"))
    specs, place = load_specs(arguments.tasks_file), OutputPlace(folder)
    if not (place.out / RECIPE).is_file():
        raise OutputError(Problem(str(folder), "holds no finished merge", "give the output folder of a merge"))
    watcher = show.ProgressWatcher(stderr, quiet=arguments.quiet or arguments.json)
    with traceback_kept(traceback_beside(place.out)), place.locked(), watcher.progress:
        recipe = finished_recipe(place.out)
        watcher.phase("measuring on images")
        scored = _scored(recipe, place.out)
        document = _document(recipe, place.out, scored, specs, arguments.images)
        watcher.phase("drawing")
        pictures, warnings = _pictures(document)
        _write(place.out, document, _told(recipe.as_seen_from(place.out), scored.compared), pictures)
    show.show_warnings(stderr, warnings)
    if arguments.json:
        show.show_json(stdout, {"out": str(place.out), **document})
    elif not arguments.quiet:
        _show(stdout, document, place.out / REPORT)
    return 0


class _Scored(NamedTuple):
    """What was measured of a merge, all of the same examples.

    Attributes:
      steps: accuracies by task after every step; empty where there are none.
      limit: at most so many examples of each task; None for all.
      compared: the models that were evaluated on the merge's tasks, of `evaluation.json`.
      left_out: why that file's are not here; empty if they are, or there is no such file.
    """

    steps: Sequence[Mapping[str, float]]
    limit: int | None
    compared: Sequence[Mapping[str, Any]] = ()
    left_out: str = ""


def _scored(recipe: Recipe, folder: Path) -> _Scored:
    """The scores that can be compared: those of other examples, or in another type, cannot."""
    limit = recipe.steps[-1].accuracy_limit
    steps = [step.accuracy or {} if step.accuracy_limit == limit else {} for step in recipe.steps]
    if not (folder / EVALUATION).is_file():
        return _Scored(steps, limit)
    found = read_scores(folder / EVALUATION)
    if found["tasks"] != recipe.task_names:
        return _Scored(steps, limit, left_out=f"the scores in {EVALUATION} are of other tasks")
    if not any(steps):
        return _Scored(steps, found["limit"], found["models"])
    if (found["limit"], found["dtype"]) == (limit, "float32"):
        return _Scored(steps, limit, found["models"])
    which = of_examples(found["limit"]) or " of all examples"
    what = f"the scores in {EVALUATION} are{which} in {found['dtype']}, those after each step"
    return _Scored(steps, limit, left_out=f"{what}{of_examples(limit) or ' of all'} in float32")


def _document(
    recipe: Recipe, folder: Path, scored: _Scored, specs: Mapping[str, Spec], n_images: int
) -> dict[str, Any]:
    tasks = recipe.task_names
    forecast = read_forecast(folder / FORECAST) if (folder / FORECAST).is_file() else []
    measured, missing = _measured(recipe, folder, specs, n_images)
    return make_document(
        tasks=tasks,
        method=recipe.settings.method,
        forecast=forecast,
        accuracies=accuracy_matrix(scored.steps, tasks) if any(scored.steps) else None,
        measured=measured,
        missing=missing | ({"comparison": scored.left_out} if scored.left_out else {}),
        limit=scored.limit,
    )


def _measured(
    recipe: Recipe, folder: Path, specs: Mapping[str, Spec], n_images: int
) -> tuple[Measured | None, dict[str, str]]:
    """Affinities, and the losses of the same merge done again; or why there are none."""
    settings, missing = recipe.settings, dict[str, str]()
    rule, rules = methods.find(settings.method), {}
    how: dict[str, Any] = {"layers": settings.layers, "other_params": settings.other_params, "conv": settings.conv}
    if rule.needs_data or rule.adds_parameters:
        missing["losses"] = f"{rule.name} needs {rule.needs}, and is not merged again"
    else:
        rules[rule.name] = methods.get(rule.name, settings.config, seed=settings.seed, **how)
    try:
        base = open_checkpoint(recipe.base.source, revision=recipe.base.revision)
        images = _images(recipe.task_names, base, specs, n_images)
        tasks = [open_task(task.source, base, revision=task.revision) for task in recipe.tasks]
        _require_unchanged([(recipe.base, base), *zip(recipe.tasks, tasks, strict=True)], folder)
        params = base.read()
        touched = methods.select(params, scope=rule.scope, **how).touched
        models = [_as_merged(params, base, task, touched, asked_for=settings.layers is not None) for task in tasks]
        return measure(params, models, base.config, images, rules), missing
    except NufiltError as error:  # the rest of the report needs none of this
        causes = dict[str, list[str]]()  # of which several files may have one
        for found in error.problems:
            causes.setdefault(found.what, []).append(found.where)
        reason = "; ".join(f"{', '.join(where)}: {what}" for what, where in causes.items())
        return None, {"affinity": reason, "losses": reason}


def _require_unchanged(models: Iterable[tuple[Model, Checkpoint]], folder: Path) -> None:
    """Refuses models that are no longer what was merged."""
    changes = (then.changes(now.sha256_as(then.sha256 or {}), then.source, folder) for then, now in models)
    raise_all(CheckpointError, (problem for found in changes for problem in found))


def _as_merged(
    params: Params, base: Checkpoint, task: Checkpoint, touched: Sequence[str], *, asked_for: bool
) -> dict[str, Any]:
    """A task's tensors as the merge read them, in the base's names; those that it lacks are the base's.

    Raises:
      CheckpointError: it does not fit the base.
    """
    fitted = fit(base, task, touched, asked_for=asked_for)
    raise_all(CheckpointError, fitted.problems)
    theirs = [name for name, info in fitted.task.tensors.items() if name in params and info.shape == params[name].shape]
    return {**params, **fitted.task.read(theirs)}


def _images(names: Sequence[str], base: Checkpoint, specs: Mapping[str, Spec], n_images: int) -> Sequence[TaskImages]:
    """Images of the tasks: drawn for built-in models, else from their data sets."""
    family = built_in_family(base.config)
    if family is not None and set(names) <= set(family.tasks):
        drawn = (draw(name, "test", n_images, family.looks[name])[0] for name in names)
        return [TaskImages(images, IMAGE_MEAN, IMAGE_STD) for images in drawn]
    parse_vision_config(base.config)  # any other kind of model is refused before anything is downloaded
    preprocessor = read_json(base.path / "preprocessor_config.json", "restore it, or download the base again")
    how: dict[str, Any] = {"model_config": base.config, "preprocessor_config": preprocessor, "limit": n_images}
    return read_task_images(names, specs, **how)


def _pictures(document: Mapping[str, Any]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The pictures, and why there are none."""
    try:
        return draw_pictures(document), ()
    except MissingExtraError as error:
        return {}, tuple(str(found) for found in error.problems)


def _write(out: Path, document: dict[str, Any], told: Told, pictures: Mapping[str, bytes]) -> None:
    shutil.rmtree(out / PICTURES, ignore_errors=True)
    (out / PICTURES).mkdir()
    files = {f"{PICTURES}/{name}.png": content for name, content in pictures.items()}
    files[REPORT] = report_page(document, told, pictures).encode()
    for name, content in files.items():
        atomic_write(out / name, content)
    write_json(out / ANALYSIS, document)


def _told(recipe: Recipe, compared: Sequence[Mapping[str, Any]]) -> Told:
    """What a report tells of a merge's recipe."""
    settings = recipe.settings.to_json()
    config, compiled = settings.pop("config"), recipe.compiled
    return Told(
        steps=[(step.task, step.seconds, dict(step.timings)) for step in recipe.steps],
        timings=recipe.timings,
        compiled=(compiled.programs, compiled.seconds) if compiled else None,
        inputs=[
            (model.name, model.source, model.revision, model.sha256 or {}) for model in (recipe.base, *recipe.tasks)
        ],
        settings={**settings, **config, **recipe.versions, "device": recipe.device},
        compared=compared,
    )


def _show(console: Console, document: Mapping[str, Any], report: Path) -> None:
    """A row per step, and where the report is."""
    columns: dict[str, list[float | None]] = {}
    if found := document["accuracy"]:
        columns[_LOST] = [None if x is None else 100 * x for x in found["lost"]]
    if found := document["forecast"]:
        columns["forecast_drift"] = found["mean"]["drift"]
    if found := document["losses"]:
        steps = found["methods"][document["method"]]["relative"][WHOLE_MODEL]
        columns |= {f"{name}_loss": steps[name] for name in ("stability", "plasticity")}
    names = document["tasks"]
    cells = {"step": [str(number) for number in range(1, len(names) + 1)], "task": list(names)}
    for head, values in columns.items():
        cells[head] = ["" if x is None else f"{x:.1f}" if head == _LOST else f"{x:.4f}" for x in values]
    show.show_table(console, cells, texts=("task",))
    if document["accuracy"] and (some := of_examples(document["limit"])):
        show.show_line(console, f"accuracies are{some} of each task")
    if found := document["affinity"]:
        group = found["groups"][WHOLE_MODEL]
        means = np.array([group["own_mean"], group["cross_mean"]], float)
        text = f"{means[0]:.3f} own task, {means[1]:.3f} other tasks, {found['random']:.3f} random"
        show.show_line(console, f"affinity of data with task vectors, mean: {text}")
    for reason in dict.fromkeys(document["missing"].values()):
        parts = ", ".join(part for part, why in document["missing"].items() if why == reason)
        show.show_wrapped(console, f"{parts}: not known: {printable(reason)}")
    show.show_line(console, f"report: {report}")
