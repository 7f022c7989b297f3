"""Training of the built-in towers on frozen zero-shot heads.

All parameters are trained, but in fine-tuning those that merging leaves at the base's values (fc2, biases, norms,
embeddings) at a fifth of the rate: at the full rate much of a task would sit where merging cannot reach.
Everything follows from fixed seeds; on another machine the last bits of the sums, and so the weights, may differ.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from nufilt_jax.evaluation import class_logits, orthogonal_head
from nufilt_jax.models import ClipVisionConfig, canonical_shapes, parse_vision_config, to_flax_tree, vision_features
from nufilt_jax.zoo.draws import CLASS_NAMES, Nuisance, draw
from nufilt_jax.zoo.families import IMAGE_MEAN, IMAGE_STD, Family, Phase

SEED = 20250921
_SLOTS = max(len(names) for names in CLASS_NAMES.values())
_LOGIT_SCALE = 16.0  # CLIP's 100 would let one image of a batch take most of the gradient
_STEPS_PER_CALL = 50

_SELECTED = re.compile(r"(q_proj|k_proj|v_proj|out_proj|fc1)\.weight$")

TowerParams = dict[str, Float[Array, "..."]]


@dataclasses.dataclass(frozen=True)
class Data:
    """Images, labels and heads of some tasks, heads padded to one number of classes."""

    images: UInt8[np.ndarray, "tasks n 3 h w"]
    labels: Int[np.ndarray, "tasks n"]
    heads: Float[np.ndarray, "tasks slots d"]
    is_class: Bool[np.ndarray, "tasks slots"]


def make_heads(family: Family) -> dict[str, Float[np.ndarray, "c d"]]:
    """One frozen orthonormal embedding per class of every task."""
    width = family.config["hidden_size"]
    return {
        task: orthogonal_head(len(CLASS_NAMES[task]), width, seed=SEED + index)
        for index, task in enumerate(family.tasks)
    }


def make_data(family: Family, tasks: Sequence[str], nuisance: Nuisance, n_images: int) -> Data:
    """Draws the training split of some tasks."""
    drawn = [draw(task, "train", n_images, nuisance) for task in tasks]
    heads = make_heads(family)
    n_classes = np.array([len(CLASS_NAMES[task]) for task in tasks])
    padded = [np.pad(heads[task], ((0, _SLOTS - len(heads[task])), (0, 0))) for task in tasks]
    return Data(
        np.stack([images for images, _ in drawn]),
        np.stack([labels for _, labels in drawn]),
        np.stack(padded),
        np.arange(_SLOTS) < n_classes[:, None],
    )


def initial_params(family: Family, seed: int) -> TowerParams:
    """A tower before training: scaled normal weights, norms of one, biases of zero."""
    rng = np.random.default_rng(seed)
    params: TowerParams = {}
    for name, shape in canonical_shapes(parse_vision_config(family.config)).items():
        if name.endswith(".bias"):
            value = np.zeros(shape)
        elif len(shape) == 1 and not name.endswith("class_embedding"):
            value = np.ones(shape)
        else:
            value = rng.standard_normal(shape) / np.sqrt(math.prod(shape[1:] or shape))
        params[name] = jnp.asarray(value, jnp.float32)
    return params


def train_tower(
    family: Family, params: TowerParams, data: Data, phase: Phase, key: Key[Array, ""]
) -> tuple[TowerParams, list[float]]:
    """Trains on all tasks of `data` at once.

    Args:
      family: whose tower it is.
      params: flat dict under canonical names; left as it is.
      data: of the tasks.
      phase: settings.
      key: decides which images meet in a batch.

    Returns:
      The trained parameters, and the mean loss of every call of 50 steps.
    """
    arrays = (data.images, data.labels, data.heads, data.is_class)
    images, labels, heads, is_class = (jax.device_put(array) for array in arrays)
    state = _optimiser(phase).init(params)
    tower = parse_vision_config(family.config)
    losses: list[float] = []
    for index in range(phase.steps // _STEPS_PER_CALL):
        call_key = jax.random.fold_in(key, index)
        params, state, loss = _run(params, state, call_key, images, labels, heads, is_class, tower=tower, phase=phase)
        losses.append(float(loss))
    return params, losses


def _optimiser(phase: Phase) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, phase.learning_rate, phase.steps // 20, phase.steps)
    others = optax.masked(optax.scale(phase.other_rate), _is_other)
    return optax.chain(optax.adamw(schedule, weight_decay=phase.weight_decay), others)


def _is_other(params: TowerParams) -> dict[str, bool]:
    """Which parameters are not weights of q, k, v, out or fc1: these alone are what the method merges."""
    return {name: _SELECTED.search(name) is None for name in params}


@functools.partial(jax.jit, static_argnames=("tower", "phase"))
def _run(
    params: TowerParams,
    state: optax.OptState,
    key: Key[Array, ""],
    images: UInt8[Array, "tasks n 3 h w"],
    labels: Int[Array, "tasks n"],
    heads: Float[Array, "tasks slots d"],
    is_class: Bool[Array, "tasks slots"],
    *,
    tower: ClipVisionConfig,
    phase: Phase,
) -> tuple[TowerParams, optax.OptState, Float[Array, ""]]:
    """Fifty optimiser steps in one call."""
    optimiser = _optimiser(phase)

    def step(carry, step_key):
        params, state = carry
        chosen = jax.random.randint(step_key, (images.shape[0], phase.batch), 0, images.shape[1])
        batch = jax.vmap(lambda rows, index: rows[index])(images, chosen)
        answers = jax.vmap(lambda rows, index: rows[index])(labels, chosen)
        loss, slope = jax.value_and_grad(_loss)(params, batch, answers, heads, is_class, tower)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types
            change, state = optimiser.update(slope, state, params)
        return (cast(TowerParams, optax.apply_updates(params, change)), state), loss

    (params, state), losses = jax.lax.scan(step, (params, state), jax.random.split(key, _STEPS_PER_CALL))
    return params, state, losses.mean()


def _loss(
    params: TowerParams,
    images: UInt8[Array, "tasks b 3 h w"],
    labels: Int[Array, "tasks b"],
    heads: Float[Array, "tasks slots d"],
    is_class: Bool[Array, "tasks slots"],
    tower: ClipVisionConfig,
) -> Float[Array, ""]:
    """Mean cross-entropy of the zero-shot heads over tasks and images."""
    pixels = (images.astype(jnp.float32) / 255 - IMAGE_MEAN[0]) / IMAGE_STD[0]
    tree = to_flax_tree(params, tower, whole_model=False)
    features = vision_features(tree, pixels.reshape(-1, *pixels.shape[2:]), tower)
    features = features.reshape(*labels.shape, -1)
    logits = jax.vmap(functools.partial(class_logits, scale=_LOGIT_SCALE))(features, heads)
    logits = jnp.where(is_class[:, None], logits, -1e9)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
