"""Streams of tasks that benchmarks merge and score: the built-in study, or the paper's checkpoints and data sets."""

import abc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nufilt_jax.checkpoints import load, open_checkpoint
from nufilt_jax.engine.evaluation import open_suite
from nufilt_jax.engine.examples import load_examples, pixels
from nufilt_jax.engine.job import EvaluationOptions
from nufilt_jax.errors import ConfigError, Problem
from nufilt_jax.evaluation import Task, evaluate_tasks
from nufilt_jax.evaluation.clip.images import TaskImages
from nufilt_jax.evaluation.learning_data import clip_task_data
from nufilt_jax.methods import TaskData
from nufilt_jax.methods.adaptation import LearningConfig
from nufilt_jax.presets import FLAN_T5, Preset, clip_preset, flan_t5_preset
from nufilt_jax.zoo import STUDY, Family, evaluation_tasks, load_params
from nufilt_jax.zoo.draws import Split
from nufilt_jax.zoo.store import weights_folder

Params = Mapping[str, np.ndarray]
ORDERS = (1, 2, 3, 4, 5)


class Stream(abc.ABC):
    """A base, its tasks in the order given, and what they are scored on.

    Attributes:
      name: of the results file.
      tasks: names.
      config: the base's `config.json`.
    """

    name: str
    tasks: tuple[str, ...]
    config: Mapping[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What results are of: those of another stream do not mix with them."""
        return {"name": self.name, "tasks": list(self.tasks)}

    @abc.abstractmethod
    def model(self, name: str) -> Params:
        """Parameters of "base" or of one task's model."""

    @abc.abstractmethod
    def scores(self, params: Params, names: Sequence[str], split: Split = "test") -> dict[str, float]:
        """Accuracy in [0, 1] by task."""

    @abc.abstractmethod
    def examples(self, name: str, config: LearningConfig, seed: int) -> TaskData:
        """Unlabelled examples of one task, for the methods that learn from them."""


class StudyStream(Stream):
    """The built-in study; the models have to be there (python -m nufilt_jax.zoo.train study)."""

    def __init__(self, family: Family = STUDY, n_images: int = 500) -> None:
        self.name, self.tasks, self.config = family.name, family.tasks, family.config
        self._family, self._n_images = family, n_images
        self._models = {name: load_params(name, family) for name in ("base", *family.tasks)}
        self._tasks: dict[Split, dict[str, Task]] = {
            split: {
                task.name: task
                for task in evaluation_tasks(family.tasks, n_images=n_images, split=split, family=family)
            }
            for split in ("val", "test")
        }

    @property
    def identity(self) -> dict[str, Any]:
        """With the number of images, and what the models scored when they were made."""
        record = json.loads((weights_folder(self._family) / "training.json").read_text())
        return super().identity | {"images": self._n_images, "validation": record["validation"]}

    def model(self, name: str) -> Params:
        """See `Stream`."""
        return self._models[name]

    def scores(self, params: Params, names: Sequence[str], split: Split = "test") -> dict[str, float]:
        """See `Stream`."""
        return evaluate_tasks(params, self.config, [self._tasks[split][name] for name in names])

    def examples(self, name: str, config: LearningConfig, seed: int) -> TaskData:
        """Of the test draw, as the methods' authors have it."""
        task = self._tasks["test"][name]
        draw = {"steps": config.steps, "batch_size": config.batch_size, "seed": seed}
        per_class = config.examples_per_class
        found = clip_task_data(pixels(task), task.head, task.labels, self.config, examples_per_class=per_class, **draw)
        return TaskData(*found)

    def images(self, names: Sequence[str]) -> list[TaskImages]:
        """Of these tasks, from the test draw, without the answers."""
        tasks = (self._tasks["test"][name] for name in names)
        return [TaskImages(task.images, task.mean, task.std) for task in tasks]


class PaperStream(Stream):
    """The paper's checkpoints on the paper's data sets, from the Hugging Face Hub or its local cache.

    Models are read when they are wanted and not kept: twenty of them do not fit into every memory.
    """

    def __init__(self, model: str, group: int, data: Path | None = None) -> None:
        is_text = model == FLAN_T5
        self.preset: Preset = flan_t5_preset(None, 2) if is_text else clip_preset(model, group, 0)
        self.name = f"paper_{model}" if is_text else f"paper_{model}_{group}"
        self._sources = {"base": self.preset.base, **dict(self.preset.tasks)}
        self.tasks = tuple(name for name, _ in self.preset.tasks)
        self._data = data
        base = open_checkpoint(self.preset.base, role="base")
        self.config = base.config
        self._suite = open_suite(self.tasks, base, EvaluationOptions())

    def model(self, name: str) -> Params:
        """See `Stream`."""
        return load(self._sources[name])

    def scores(self, params: Params, names: Sequence[str], split: Split = "test") -> dict[str, float]:
        """See `Stream`; there is the test draw alone."""
        if split != "test":
            raise ConfigError(Problem("split", f"{self.name} has no {split!r} draw"))
        return {task.name: task.score(params) for task in self._suite.tasks if task.name in names}

    def examples(self, name: str, config: LearningConfig, seed: int) -> TaskData:
        """From the folder of examples."""
        if self._data is None:
            raise ConfigError(Problem("--data", "is missing", "give the folder of examples"))
        return load_examples(self._data / f"{name}.safetensors", self.config, config, seed)
