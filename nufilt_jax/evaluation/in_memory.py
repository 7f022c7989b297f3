"""Accuracy of models on tasks whose images are in memory."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int, UInt8

from nufilt_jax.config import ComputeType
from nufilt_jax.errors import ConfigError, Problem
from nufilt_jax.evaluation.scoring import Classifier


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """One image classification task, ready for a zero-shot head.

    Attributes:
      name: short name, the key of its score.
      images: normalised float32, or uint8 as in files, normalised on the device with `mean` and `std`.
      labels: index into `class_names`.
      head: class embeddings of unit length.
      class_names: one per row of `head`.
      mean: per channel, subtracted from uint8 images after these were divided by 255.
      std: per channel, divides uint8 images after that.
    """

    name: str
    images: Float[np.ndarray, "n 3 h w"] | UInt8[np.ndarray, "n 3 h w"]
    labels: Int[np.ndarray, " n"]
    head: Float[np.ndarray, "c d"]
    class_names: tuple[str, ...]
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if len(self.class_names) != len(self.head):
            what = f"{len(self.class_names)} class names for a head of {len(self.head)} classes"
            raise ConfigError(Problem(f"task {self.name}", what))
        _check(self.images, self.labels, self.head, f"task {self.name}")


def accuracy(
    params: Mapping[str, ArrayLike],
    config: Mapping[str, Any],
    images: Float[np.ndarray, "n 3 h w"],
    labels: Int[np.ndarray, " n"],
    head: Float[np.ndarray, "c d"],
    *,
    batch_size: int | None = None,
) -> float:
    """Share of images whose nearest class embedding is the right one.

    The result does not depend on `batch_size`, but for models with experts: an image's answer is then that of its
    batch. They see the images in their order, and what is left over as a batch of its own.

    Args:
      params: flat dict under canonical names, as `clip_image_features` takes it.
      config: the model's `config.json`.
      images: normalised as the model's preprocessor does.
      labels: index into `head`.
      head: class embeddings of unit length.
      batch_size: images per call of the compiled program; None for 256, or 128 for models with experts.

    Returns:
      Accuracy in [0, 1]. On a tie the class that comes first is taken.

    Raises:
      CheckpointError: parameters and config do not fit; see `clip_image_features`.
      ConfigError: there are no images, or a label has no class.
    """
    names = tuple(str(index) for index in range(len(head)))
    task = Task(name="task", images=images, labels=labels, head=head, class_names=names)
    return evaluate_tasks(params, config, [task], batch_size=batch_size)["task"]


def evaluate_tasks(
    params: Mapping[str, ArrayLike],
    config: Mapping[str, Any],
    tasks: Sequence[Task],
    *,
    batch_size: int | None = None,
    dtype: ComputeType = "float32",
) -> dict[str, float]:
    """Accuracy of one model on every task, in [0, 1], by task name.

    Args:
      params: flat dict under canonical names, as `clip_image_features` takes it.
      config: the model's `config.json`.
      tasks: with names of their own.
      batch_size: see `accuracy`.
      dtype: in which the forward pass computes; layer norms and softmax stay in float32.

    Raises:
      CheckpointError: parameters and config do not fit; see `clip_image_features`.
      ConfigError: two tasks share a name, or a head does not fit the model's features.
    """
    repeated = sorted({task.name for task in tasks if sum(task.name == other.name for other in tasks) > 1})
    if repeated:
        raise ConfigError(Problem("tasks", f"names stand twice: {', '.join(repeated)}"))
    classifier = Classifier(params, config, batch_size=batch_size, dtype=dtype)
    return {task.name: _score(classifier, task) for task in tasks}


def _score(classifier: Classifier, task: Task) -> float:
    size = classifier.batch_size
    rows = (slice(start, start + size) for start in range(0, len(task.labels), size))
    batches = ((task.images[part], task.labels[part]) for part in rows)
    hits = classifier.hits(batches, task.head, task.mean, task.std, where=f"task {task.name}")
    return sum(hits) / len(task.labels)


def _check(images: np.ndarray, labels: np.ndarray, head: np.ndarray, where: str) -> None:
    if len(images) != len(labels) or len(labels) == 0:
        raise ConfigError(Problem(where, f"{len(images)} images and {len(labels)} labels"))
    if labels.min() < 0 or labels.max() >= len(head):
        what = f"labels go from {labels.min()} to {labels.max()}, the head has {len(head)} classes"
        raise ConfigError(Problem(where, what))
