"""Seed sets: the few unlabelled examples of a task that some merging rules learn from, and the model's answer to them.

The helpers return what `methods.TaskData` is made of: batches, and one forward function per kind of model.
"""

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nufilt_jax.errors import ConfigError, Problem
from nufilt_jax.evaluation.clip.zero_shot import class_logits, padded_head
from nufilt_jax.models.clip import vision_features
from nufilt_jax.models.clip_config import ClipVisionConfig, parse_vision_config
from nufilt_jax.models.clip_names import to_flax_tree
from nufilt_jax.models.t5 import t5_tree_logits
from nufilt_jax.models.t5_config import T5Config, parse_t5_config
from nufilt_jax.models.t5_names import to_t5_tree

# Of T5's texts so many are drawn, whatever their classes, and the model is asked for the first token after this one:
# so the authors' program has it.
T5_EXAMPLES, T5_FIRST_TOKEN = 100, 1

Inputs = dict[str, Any]
Answer = Callable[[Mapping[str, Any], Inputs], Any]


def clip_task_data(
    images: Float[np.ndarray, "n c h w"],
    head: Float[np.ndarray, "classes d"],
    labels: Int[np.ndarray, " n_labels"] | None,
    config: Mapping[str, Any],
    *,
    steps: int,
    batch_size: int,
    examples_per_class: int,
    seed: int,
) -> tuple[Iterator[Inputs], Answer]:
    """Batches of a seed set, and the zero-shot classifier's logits.

    Args:
      images: normalised as the model's preprocessor does; read batch by batch.
      head: class embeddings of unit length.
      labels: serve to draw equally from every class, and for nothing else; None draws as many without regard to class.
      config: the model's `config.json`.
      steps: number of batches.
      batch_size: images per batch.
      examples_per_class: size of the seed set; classes with fewer images give all.
      seed: of the draw and of the order.

    Returns:
      The batches, and a function of a model's parameters and a batch, the same one for all tasks of a config. It
      scales cosines by exp(`logit_scale`), or by 100 if the parameters have none.

    Raises:
      CheckpointError: the config is not of a CLIP model.
      ConfigError: there are no images, or another number of labels.
    """
    vision = parse_vision_config(config)
    if len(images) == 0 or (labels is not None and len(labels) != len(images)):
        n_labels = "none" if labels is None else len(labels)
        raise ConfigError(Problem("data", f"there are {len(images)} images, labels: {n_labels}"))
    generator = random.Random(seed)
    seed_set = _seed_set(len(images), len(head), labels, examples_per_class, generator)
    same = dict(zip(("prototypes", "is_class"), padded_head(head), strict=True))
    chosen = shuffled_batches(seed_set, steps=steps, batch_size=batch_size, generator=generator)
    batches = ({"pixel_values": images[rows].astype(np.float32), **same} for rows in chosen)
    return batches, _clip_forward(vision, config.get("model_type") == "clip")


def t5_task_data(
    input_ids: Int[np.ndarray, "n tokens"],
    attention_mask: Int[np.ndarray, "n tokens"],
    config: Mapping[str, Any],
    *,
    steps: int,
    batch_size: int,
    seed: int,
) -> tuple[Iterator[Inputs], Answer]:
    """Batches of a seed set of texts, and the logits of the first word of the answers.

    Args:
      input_ids: the encoder's tokens.
      attention_mask: zero at padding.
      config: the model's `config.json`.
      steps: number of batches.
      batch_size: texts per batch.
      seed: of the draw and of the order.

    Returns:
      The batches, and a function of a model's parameters and a batch, the same one for all tasks of a config.

    Raises:
      CheckpointError: the config is not of a T5 model.
      ConfigError: there are no texts, or masks of another shape.
    """
    t5 = parse_t5_config(config)
    if len(input_ids) == 0 or input_ids.shape != attention_mask.shape:
        what = f"input_ids are {list(input_ids.shape)}, attention_mask is {list(attention_mask.shape)}"
        raise ConfigError(Problem("data", what))
    generator = random.Random(seed)
    seed_set = generator.sample(range(len(input_ids)), min(T5_EXAMPLES, len(input_ids)))
    chosen = shuffled_batches(seed_set, steps=steps, batch_size=batch_size, generator=generator)
    texts = {"input_ids": input_ids.astype(np.int32), "attention_mask": attention_mask.astype(np.int32)}
    return ({name: rows_of[rows] for name, rows_of in texts.items()} for rows in chosen), _t5_forward(t5)


def _seed_set(
    n_images: int,
    n_classes: int,
    labels: Int[np.ndarray, " n"] | None,
    examples_per_class: int,
    generator: random.Random,
) -> list[int]:
    if labels is None:
        return generator.sample(range(n_images), min(n_classes * examples_per_class, n_images))
    members = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    return [row for rows in members for row in generator.sample(rows, min(examples_per_class, len(rows)))]


def shuffled_batches(
    rows: Sequence[int], *, steps: int, batch_size: int, generator: random.Random
) -> Iterator[list[int]]:
    """Batches of one size, cut from one pass over the rows after another, each in an order of its own."""
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < batch_size:
            waiting += generator.sample(rows, len(rows))
        yield waiting[:batch_size]
        del waiting[:batch_size]


@functools.lru_cache
def _clip_forward(config: ClipVisionConfig, whole_model: bool) -> Answer:
    """The same function for the same config, so that what runs it is compiled once."""

    def forward(params: Mapping[str, Any], batch: Inputs) -> Float[Array, "b slots"]:
        features = vision_features(to_flax_tree(params, config, whole_model=whole_model), batch["pixel_values"], config)
        scale = jnp.exp(params["logit_scale"]) if "logit_scale" in params else 100.0
        logits = class_logits(features, batch["prototypes"], scale)
        return jnp.where(batch["is_class"][None], logits, -jnp.inf)

    return forward


@functools.lru_cache
def _t5_forward(config: T5Config) -> Answer:
    def forward(params: Mapping[str, Any], batch: Inputs) -> Float[Array, "b vocab"]:
        tokens = batch["input_ids"]
        start = jnp.full((len(tokens), 1), T5_FIRST_TOKEN, tokens.dtype)
        return t5_tree_logits(to_t5_tree(params, config), tokens, batch["attention_mask"], start, config)[:, 0]

    return forward
