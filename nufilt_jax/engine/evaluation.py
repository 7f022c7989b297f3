"""Evaluating models: on which tasks, what a merge keeps of it, and the files that tell."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nufilt_jax.analysis.plots import draw_accuracy_matrix
from nufilt_jax.checkpoints import Checkpoint, load, open_checkpoint, parse_source
from nufilt_jax.config import problem
from nufilt_jax.engine.job import EvaluationOptions, finished_recipe
from nufilt_jax.engine.scores import ScoreRow, merged_row, plain_row
from nufilt_jax.engine.tiny import built_in_family, built_in_tasks
from nufilt_jax.errors import (
    ConfigError,
    EvaluationError,
    MissingExtraError,
    NufiltError,
    OutputError,
    Problem,
    raise_all,
)
from nufilt_jax.evaluation import accuracy_matrix
from nufilt_jax.evaluation.clip.heads import TextHeads
from nufilt_jax.evaluation.metrics import of_examples
from nufilt_jax.evaluation.ready import OnBatch
from nufilt_jax.evaluation.specs import Spec, load_specs
from nufilt_jax.evaluation.suite import EvaluatedModel, Suite, open_tasks, spec_problems
from nufilt_jax.evaluation.tokenizer import open_tokenizer
from nufilt_jax.output.documents import read_scores, write_json
from nufilt_jax.output.place import RECIPE
from nufilt_jax.output.recipe import Recipe, Step
from nufilt_jax.zoo import family_folder

EVALUATION = "evaluation.json"
PICTURE = "accuracy_matrix.png"

Tell = Callable[[str], None]  # is told how far it is


def task_problems(names: Sequence[str], config: Mapping[str, Any], tasks_file: Path | None) -> list[Problem]:
    """Tasks that are not known, or not for this kind of model; nothing is downloaded.

    Args:
      names: of the tasks.
      config: `config.json` of the model.
      tasks_file: describes tasks beside those that are known.

    Raises:
      ConfigError: the file is not as it should be.
    """
    specs = load_specs(tasks_file)
    return spec_problems(_described(names, specs, config), specs, config)


def open_suite(names: Sequence[str], model: Checkpoint, options: EvaluationOptions) -> Suite:
    """Finds the data of all tasks, and what they need of the model.

    Args:
      names: of the tasks; those of a built-in model are known without a description.
      model: the one to evaluate, or the base of those.
      options: how.

    Raises:
      NufiltError: with everything that is missing or does not fit.
    """
    specs = load_specs(options.tasks_file)
    described = _described(names, specs, model.config)
    raise_all(ConfigError, spec_problems(described, specs, model.config))
    heads = functools.partial(_open_heads, model, options)
    whole = EvaluatedModel(folder=model.path, config=model.config, open_heads=heads)
    ready = open_tasks(described, specs, whole, limit=options.limit, offline=options.offline, dtype=options.dtype)
    built_in = [name for name in names if name not in described]
    if built_in:
        ready |= built_in_tasks(built_in, model.config, limit=options.limit, dtype=options.dtype)
    return Suite([ready[name] for name in names])


def _described(names: Sequence[str], specs: Mapping[str, Spec], config: Mapping[str, Any]) -> list[str]:
    """The tasks that have a description, or need one: all but a built-in model's own."""
    family = built_in_family(config)
    return [name for name in names if name in specs or family is None or name not in family.tasks]


def _open_heads(model: Checkpoint, options: EvaluationOptions) -> TextHeads:
    if options.heads_from is not None:
        source, revision = parse_source(options.heads_from)
        model = open_checkpoint(source, revision=revision, offline=options.offline, role="base")
    heads = TextHeads(model.read(), model.config, model.path, cache=family_folder().with_name("heads"))
    open_tokenizer(model.path)  # it is used with the first head, which is long after a merge has begun
    return heads


class Evaluation:
    """What a merge does to be evaluated: the model is scored after every step, and files tell of it at the end.

    Attributes:
      warnings: of what could not be done, known at the end.
    """

    def __init__(
        self,
        names: Sequence[str],
        suite: Suite,
        options: EvaluationOptions,
        tell: Tell,
        compare: Callable[[str, Tell], list[ScoreRow]] | None = None,
    ) -> None:
        """Takes an opened suite.

        Args:
          names: of the tasks, in the order merged.
          suite: the same tasks, opened.
          options: with which they were opened.
          tell: is told how far it is.
          compare: from the method's name, and who is told, to the rows of other models, to stand above the merge.
        """
        self._names, self._suite, self._options, self._tell, self._compare = names, suite, options, tell, compare
        self.warnings: list[str] = []

    def entry(self, params: Mapping[str, Any], task: str) -> dict[str, Any]:
        """What the recipe's entry of a step gets: scores on all tasks, those still to be merged included."""
        with _evaluating():
            accuracy = self._suite.score(params, on_batch=_telling(self._tell, f"evaluating after {task}"))
        return {"accuracy": accuracy, "accuracy_limit": self._options.limit}

    def covers(self, step: Step) -> bool:
        """Whether a step holds what `entry` would say."""
        return set(self._names) <= _comparable(step, self._options).keys()

    def finish(self, folder: Path, recipe: Recipe) -> None:
        """Writes scores and the picture of the accuracy matrix into an output folder."""
        scores = [_comparable(step, self._options) for step in recipe.steps]
        with _evaluating():
            rows = self._compare(recipe.settings.method, self._tell) if self._compare else []
        rows.append(merged_row(recipe.settings.method, scores, self._names, *_seconds(recipe.steps)))
        write_json(folder / EVALUATION, _head(self._names, self._options) | {"models": rows})
        self._tell("drawing the accuracies")
        try:
            title = f"{recipe.settings.method}: accuracy{of_examples(self._options.limit)} after each step"
            draw_accuracy_matrix(accuracy_matrix(scores, self._names), self._names, folder / PICTURE, title=title)
        except MissingExtraError as error:
            # The merge is done: that no picture can be drawn is no reason to lose it.
            self.warnings += [str(found) for found in error.problems]


def evaluate_folder(folder: Path, names: Sequence[str], options: EvaluationOptions, tell: Tell) -> dict[str, Any]:
    """Scores the model in a folder, and writes them into its `evaluation.json`.

    Other models in that file stay if theirs are of the same tasks, examples and type.

    Args:
      folder: of a model.
      names: of the tasks; none for those that were merged into it.
      options: how.
      tell: is told how far it is.

    Returns:
      What the file holds.

    Raises:
      NufiltError: with everything that is missing or does not fit.
    """
    recorded = finished_recipe(folder) if (folder / RECIPE).is_file() else None
    merged = recorded.task_names if recorded else []
    names = list(dict.fromkeys(names)) or merged
    if not names:
        fix = "name each with --task"
        raise ConfigError(problem("task", f"is missing: no recipe in {folder} tells of merged tasks", fix))
    suite = open_suite(names, open_checkpoint(str(folder), role="base"), options)
    accuracy = suite.score(load(str(folder)), on_batch=_telling(tell, "evaluating"))
    if recorded is None:
        row = plain_row(folder.name, accuracy)
    elif names != merged:
        row = plain_row(recorded.settings.method, accuracy)
    else:
        earlier = [_comparable(step, options) for step in recorded.steps[:-1]]
        row = merged_row(recorded.settings.method, [*earlier, accuracy], names, *_seconds(recorded.steps))
    document = _head(names, options) | {"models": [row]}
    if there := evaluation_there(folder, names, options):
        rows = {other["name"]: other for other in there["models"]} | {row["name"]: row}
        document |= {"models": list(rows.values())}
    write_json(folder / EVALUATION, document)
    return document


def evaluation_there(folder: Path, names: Sequence[str], options: EvaluationOptions) -> dict[str, Any] | None:
    """What a folder's `evaluation.json` holds, if it is of these tasks, examples and type.

    Args:
      folder: of a model.
      names: of the tasks, in order.
      options: how it is to be evaluated.

    Returns:
      None if there is none, it is damaged, or it answers another question.
    """
    with contextlib.suppress(OutputError):
        document = read_scores(folder / EVALUATION)
        if all(document[key] == value for key, value in _head(names, options).items()):
            return document
    return None


@contextlib.contextmanager
def _evaluating() -> Iterator[None]:
    """Says of what is refused inside that it is the evaluation's."""
    try:
        yield
    except NufiltError as error:
        raise EvaluationError(*error.problems) from error


def _head(names: Sequence[str], options: EvaluationOptions) -> dict[str, Any]:
    """What all rows of an `evaluation.json` have in common."""
    return {"tasks": list(names), "limit": options.limit, "dtype": options.dtype}


def _comparable(step: Step, options: EvaluationOptions) -> Mapping[str, float]:
    """The scores in a recipe's entry of a step; none if they are of other examples or another type."""
    is_same = step.accuracy_limit == options.limit and options.dtype == "float32"
    return step.accuracy or {} if is_same else {}


def _seconds(steps: Sequence[Step]) -> tuple[float, float]:
    """What merging took, and how much of it was compiling."""
    return sum(step.seconds for step in steps), sum(step.timings.get("compile", 0.0) for step in steps)


def _telling(tell: Tell, what: str) -> OnBatch:
    return lambda name, done, total: tell(f"{what}: {name}, {done} of {total}")
