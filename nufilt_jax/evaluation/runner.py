"""Accuracy of models on tasks: one compiled program for all models and tasks of one shape."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from nufilt_jax.errors import ConfigError, Problem
from nufilt_jax.evaluation.heads import class_logits
from nufilt_jax.models.clip import vision_features
from nufilt_jax.models.clip_config import ClipVisionConfig, parse_vision_config
from nufilt_jax.models.clip_names import to_flax_tree
from nufilt_jax.models.experts import has_experts

_BATCH = 256
_MIXED_BATCH = 128  # of models with experts, whose answers depend on it (the baselines' evaluation settings)

# Heads are padded to a power of two of at least this, so that tasks of few classes share one program.
_FEWEST_SLOTS = 64


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
) -> dict[str, float]:
    """Accuracy of one model on every task, in [0, 1], by task name.

    Args:
      params: flat dict under canonical names, as `clip_image_features` takes it.
      config: the model's `config.json`.
      tasks: with names of their own.
      batch_size: see `accuracy`.

    Raises:
      CheckpointError: parameters and config do not fit; see `clip_image_features`.
      ConfigError: two tasks share a name, or a head does not fit the model's features.
    """
    repeated = sorted({task.name for task in tasks if sum(task.name == other.name for other in tasks) > 1})
    if repeated:
        raise ConfigError(Problem("tasks", f"names stand twice: {', '.join(repeated)}"))
    is_mixed = has_experts(params)
    if batch_size is None:
        batch_size = _MIXED_BATCH if is_mixed else _BATCH
    if batch_size < 1:
        raise ConfigError(Problem("batch_size", f"must be at least 1, got {batch_size}"))
    vision = parse_vision_config(config)
    tree = to_flax_tree(params, vision, whole_model=config.get("model_type") == "clip")
    slots = max([_FEWEST_SLOTS, *(1 << (len(task.head) - 1).bit_length() for task in tasks)])
    return {task.name: _score(tree, vision, task, slots, batch_size, is_filled=not is_mixed) for task in tasks}


def _score(
    tree: Mapping[str, Any], config: ClipVisionConfig, task: Task, slots: int, batch_size: int, *, is_filled: bool
) -> float:
    """Accuracy in batches of one size, the last one filled with images that count for nothing if `is_filled`."""
    dim = tree["visual_projection"]["kernel"].shape[1] if "visual_projection" in tree else config.hidden_size
    if task.head.shape[1] != dim:
        what = f"class embeddings have {task.head.shape[1]} dimensions, the model's features {dim}"
        raise ConfigError(Problem(f"task {task.name}", what))
    n_classes = len(task.head)
    head = np.pad(task.head.astype(np.float32), ((0, slots - n_classes), (0, 0)))
    is_class = np.arange(slots) < n_classes
    mean, std = np.array(task.mean, np.float32), np.array(task.std, np.float32)
    # Left on the device and summed at the end: waiting for every batch would leave the device idle.
    hits: list[Int[Array, ""]] = []
    for start in range(0, len(task.labels), batch_size):
        images = task.images[start : start + batch_size]
        labels = task.labels[start : start + batch_size].astype(np.int32)
        if is_filled:
            images, labels = _fill(images, batch_size, 0), _fill(labels, batch_size, -1)
        hits.append(_count_hits(tree, images, labels, head, is_class, mean, std, config=config))
    return sum(int(count) for count in hits) / len(task.labels)


@functools.partial(jax.jit, static_argnames="config")
def _count_hits(
    tree: Mapping[str, Any],
    images: Float[Array, "b 3 h w"] | UInt8[Array, "b 3 h w"],
    labels: Int[Array, " b"],
    head: Float[Array, "c d"],
    is_class: Bool[Array, " c"],
    mean: Float[Array, "3"],
    std: Float[Array, "3"],
    *,
    config: ClipVisionConfig,
) -> Int[Array, ""]:
    """How many images have the right class; a label of -1 is never right."""
    pixels = images.astype(jnp.float32)
    if images.dtype == jnp.uint8:
        pixels = (pixels / 255 - mean[None, :, None, None]) / std[None, :, None, None]
    logits = class_logits(vision_features(tree, pixels, config), head)
    best = jnp.argmax(jnp.where(is_class[None], logits, -jnp.inf), axis=1)
    return jnp.sum(best == labels)


def _fill(rows: np.ndarray, n_rows: int, value: int) -> np.ndarray:
    missing = n_rows - len(rows)
    return np.pad(rows, [(0, missing), *([(0, 0)] * (rows.ndim - 1))], constant_values=value)


def _check(images: np.ndarray, labels: np.ndarray, head: np.ndarray, where: str) -> None:
    if len(images) != len(labels) or len(labels) == 0:
        raise ConfigError(Problem(where, f"{len(images)} images and {len(labels)} labels"))
    if labels.min() < 0 or labels.max() >= len(head):
        what = f"labels go from {labels.min()} to {labels.max()}, the head has {len(head)} classes"
        raise ConfigError(Problem(where, what))
