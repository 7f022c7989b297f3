"""A model's tasks, opened together, and its scores on all of them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.typing import ArrayLike

from nufilt_jax.config import ComputeType
from nufilt_jax.errors import CheckpointError, Problem, error_of, gathering
from nufilt_jax.evaluation.clip.heads import HeadMaker
from nufilt_jax.evaluation.clip.tasks import open_image_task
from nufilt_jax.evaluation.data_sets import open_data_set
from nufilt_jax.evaluation.ready import OnBatch, ReadyTask
from nufilt_jax.evaluation.specs import ImageSpec, Spec
from nufilt_jax.evaluation.t5.spec import TextSpec
from nufilt_jax.evaluation.t5.tasks import open_text_task
from nufilt_jax.evaluation.tokenizer import open_tokenizer
from nufilt_jax.strict_json import JsonError, read_object

_KINDS: Mapping[str, type] = {"clip": ImageSpec, "clip_vision_model": ImageSpec, "t5": TextSpec}
_WORDS: Mapping[type, str] = {ImageSpec: "images", TextSpec: "text"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """What tasks need of a model besides its weights.

    Attributes:
      folder: holds its preprocessor or tokenizer.
      config: its `config.json`.
      open_heads: finds the text tower that zero-shot heads are made with.
    """

    folder: Path
    config: Mapping[str, Any]
    open_heads: Callable[[], HeadMaker]


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks that are ready."""

    tasks: Sequence[ReadyTask]

    def score(self, params: Mapping[str, ArrayLike], *, on_batch: OnBatch | None = None) -> dict[str, float]:
        """Score on every task, by its name.

        Args:
          params: flat dict under canonical names.
          on_batch: told how far it is.
        """
        return {task.name: task.score(params, on_batch=on_batch) for task in self.tasks}


def spec_problems(names: Iterable[str], specs: Mapping[str, Spec], config: Mapping[str, Any]) -> list[Problem]:
    """Tasks that nobody has described, and tasks that a model of this config cannot be asked.

    Args:
      names: of the tasks wanted.
      specs: of all tasks known, by name.
      config: the model's `config.json`.
    """
    kind = config.get("model_type")
    if kind not in _KINDS:
        known = ", ".join(sorted(_KINDS))
        return [Problem("config.json", f"a model of type {kind!r} cannot be evaluated", f"these can: {known}")]
    wanted, found = _KINDS[str(kind)], list[Problem]()
    for name in names:
        if name not in specs:
            known = ", ".join(key for key, spec in specs.items() if isinstance(spec, wanted))
            fix = f"describe it in a file for --tasks-file; known are {known}"
            found.append(Problem(f"task {name}", "is not known", fix))
        elif not isinstance(specs[name], wanted):
            what = f"is one of {_WORDS[type(specs[name])]}, but the model is {kind!r}"
            found.append(Problem(f"task {name}", what, "leave it out"))
    return found


def open_tasks(
    names: Iterable[str],
    specs: Mapping[str, Spec],
    model: EvaluatedModel,
    *,
    limit: int | None = None,
    offline: bool = False,
    dtype: ComputeType = "float32",
) -> dict[str, ReadyTask]:
    """Opens the tasks; no model is run and no example is read.

    Args:
      names: of tasks that `spec_problems` has nothing against.
      specs: by name.
      model: the one to evaluate, or the base of those.
      limit: at most so many examples of each task, evenly spread, for a quick look; None for all.
      offline: use what is on this machine and nothing else.
      dtype: in which the forward passes compute.

    Raises:
      NufiltError: with everything that is wrong with any of them.
    """
    problems: list[Problem] = []
    ready: dict[str, ReadyTask] = {}
    tokenizer = functools.cache(functools.partial(open_tokenizer, model.folder))
    how: dict[str, Any] = {"model_config": model.config, "limit": limit, "offline": offline, "dtype": dtype}
    images: dict[str, Any] = {}
    if any(isinstance(specs[name], ImageSpec) for name in names):
        with gathering(problems):
            images["preprocessor_config"] = _preprocessor(model.folder)
        with gathering(problems):
            images["head"] = model.open_heads()
    for name in names:
        spec = specs[name]
        with gathering(problems):
            if isinstance(spec, TextSpec):
                ready[name] = open_text_task(spec, name, tokenizer=tokenizer, **how)
            elif len(images) == 2:
                ready[name] = open_image_task(spec, name, **images, **how)
            else:  # what they have in common is missing, and their data may be too
                at = {"split": spec.split, "config": spec.config, "revision": spec.revision}
                open_data_set(spec.dataset, **at, where=f"task {name}", offline=offline)
    if problems:
        raise error_of(problems)
    return ready


def _preprocessor(folder: Path) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    try:
        with path.open("rb") as file:
            return read_object(file, lenient=True)
    except (OSError, JsonError) as error:
        what = str(error) if isinstance(error, JsonError) else f"cannot be read: {error.strerror or error}"
        raise CheckpointError(Problem(str(path), what, "copy that of the pre-trained model into the folder")) from error
