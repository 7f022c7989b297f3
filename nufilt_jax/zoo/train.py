"""Makes the built-in checkpoints: `python -m nufilt_jax.zoo.train --out DIR`.

One tower is pre-trained on all tasks at once, on mild images; then one copy per task is fine-tuned on that
task's own images. All parameters are trained, but those that merging leaves at the base's values (fc2, biases,
norms, embeddings) at a fifth of the rate: at the full rate much of a task would sit where merging cannot reach.
Everything follows from fixed seeds; on another machine the last bits of the sums, and so the weights, may differ.
All choices were made on the validation split.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, UInt8
from rich.console import Console
from safetensors import numpy as safetensors

from nufilt_jax.evaluation import Task, class_logits, evaluate_tasks, orthogonal_head
from nufilt_jax.models import canonical_shapes, clip_image_features, parse_vision_config
from nufilt_jax.zoo.draws import CLASS_NAMES, HARD, MILD, TASK_NAMES, Nuisance, draw
from nufilt_jax.zoo.tiny import CONFIG, IMAGE_MEAN, IMAGE_STD

_SEED = 20250921
_SLOTS = max(len(names) for names in CLASS_NAMES.values())
_LOGIT_SCALE = 16.0  # CLIP's 100 would let one image of a batch take most of the gradient
_STEPS_PER_CALL = 50

_SELECTED = re.compile(r"(q_proj|k_proj|v_proj|out_proj|fc1)\.weight$")

Params = dict[str, Float[Array, "..."]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """Settings of pre-training or of fine-tuning. Hashable, so `jit` takes it as a static argument."""

    steps: int
    batch: int  # images per task and step
    learning_rate: float  # at its highest; falls to zero as a half cosine
    weight_decay: float
    n_images: int  # drawn per task
    other_rate: float = 1.0  # share of the learning rate for all that merging leaves at the base's values


PRETRAIN = Phase(steps=700, batch=40, learning_rate=2e-3, weight_decay=0.05, n_images=6000)
FINETUNE = Phase(steps=200, batch=256, learning_rate=2e-4, weight_decay=0.0, n_images=12000, other_rate=0.2)


@dataclasses.dataclass(frozen=True)
class Data:
    """Images, labels and heads of some tasks, heads padded to one number of classes."""

    images: UInt8[np.ndarray, "tasks n 3 h w"]
    labels: Int[np.ndarray, "tasks n"]
    heads: Float[np.ndarray, "tasks slots d"]
    is_class: Bool[np.ndarray, "tasks slots"]


def make_heads() -> dict[str, Float[np.ndarray, "c d"]]:
    """One frozen orthonormal embedding per class of every task."""
    return {
        task: orthogonal_head(len(CLASS_NAMES[task]), CONFIG["hidden_size"], seed=_SEED + index)
        for index, task in enumerate(TASK_NAMES)
    }


def make_data(tasks: Sequence[str], nuisance: Nuisance | None, n_images: int) -> Data:
    """Draws the training split of some tasks; `None` stands for each task's own nuisance."""
    drawn = [draw(task, "train", n_images, nuisance) for task in tasks]
    heads = make_heads()
    n_classes = np.array([len(CLASS_NAMES[task]) for task in tasks])
    padded = [np.pad(heads[task], ((0, _SLOTS - len(heads[task])), (0, 0))) for task in tasks]
    return Data(
        np.stack([images for images, _ in drawn]),
        np.stack([labels for _, labels in drawn]),
        np.stack(padded),
        np.arange(_SLOTS) < n_classes[:, None],
    )


def initial_params(seed: int) -> Params:
    """A tower before training: scaled normal weights, norms of one, biases of zero."""
    rng = np.random.default_rng(seed)
    params: Params = {}
    for name, shape in canonical_shapes(parse_vision_config(CONFIG)).items():
        if name.endswith(".bias"):
            value = np.zeros(shape)
        elif len(shape) == 1 and not name.endswith("class_embedding"):
            value = np.ones(shape)
        else:
            value = rng.standard_normal(shape) / np.sqrt(math.prod(shape[1:] or shape))
        params[name] = jnp.asarray(value, jnp.float32)
    return params


def train(params: Params, data: Data, phase: Phase, key: Key[Array, ""]) -> tuple[Params, list[float]]:
    """Trains on all tasks of `data` at once.

    Args:
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
    losses: list[float] = []
    for index in range(phase.steps // _STEPS_PER_CALL):
        call_key = jax.random.fold_in(key, index)
        params, state, loss = _run(params, state, call_key, images, labels, heads, is_class, phase=phase)
        losses.append(float(loss))
    return params, losses


def _optimiser(phase: Phase) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, phase.learning_rate, phase.steps // 20, phase.steps)
    others = optax.masked(optax.scale(phase.other_rate), _is_other)
    return optax.chain(optax.adamw(schedule, weight_decay=phase.weight_decay), others)


def _is_other(params: Params) -> dict[str, bool]:
    """Which parameters are not weights of q, k, v, out or fc1: these alone are what the method merges."""
    return {name: _SELECTED.search(name) is None for name in params}


@functools.partial(jax.jit, static_argnames="phase")
def _run(
    params: Params,
    state: optax.OptState,
    key: Key[Array, ""],
    images: UInt8[Array, "tasks n 3 h w"],
    labels: Int[Array, "tasks n"],
    heads: Float[Array, "tasks slots d"],
    is_class: Bool[Array, "tasks slots"],
    *,
    phase: Phase,
) -> tuple[Params, optax.OptState, Float[Array, ""]]:
    """Fifty optimiser steps in one call."""
    optimiser = _optimiser(phase)

    def step(carry, step_key):
        params, state = carry
        chosen = jax.random.randint(step_key, (images.shape[0], phase.batch), 0, images.shape[1])
        batch = jax.vmap(lambda rows, index: rows[index])(images, chosen)
        answers = jax.vmap(lambda rows, index: rows[index])(labels, chosen)
        loss, slope = jax.value_and_grad(_loss)(params, batch, answers, heads, is_class)
        change, state = optimiser.update(slope, state, params)
        return (cast(Params, optax.apply_updates(params, change)), state), loss

    (params, state), losses = jax.lax.scan(step, (params, state), jax.random.split(key, _STEPS_PER_CALL))
    return params, state, losses.mean()


def _loss(
    params: Params,
    images: UInt8[Array, "tasks b 3 h w"],
    labels: Int[Array, "tasks b"],
    heads: Float[Array, "tasks slots d"],
    is_class: Bool[Array, "tasks slots"],
) -> Float[Array, ""]:
    """Mean cross-entropy of the zero-shot heads over tasks and images."""
    pixels = (images.astype(jnp.float32) / 255 - IMAGE_MEAN[0]) / IMAGE_STD[0]
    features = clip_image_features(params, pixels.reshape(-1, *pixels.shape[2:]), CONFIG)
    features = features.reshape(*labels.shape, -1)
    logits = jax.vmap(functools.partial(class_logits, scale=_LOGIT_SCALE))(features, heads)
    logits = jnp.where(is_class[:, None], logits, -1e9)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _save(path: Path, params: Params) -> dict[str, Float[np.ndarray, "..."]]:
    """Writes float16 and returns what a reader gets: from here on only the rounded numbers count."""
    rounded = {name: np.asarray(value).astype(np.float16, order="C") for name, value in params.items()}
    path.write_bytes(safetensors.save(rounded, {"format": "pt"}))
    return {name: value.astype(np.float32) for name, value in rounded.items()}


def _validation_task(name: str) -> Task:
    images, labels = draw(name, "val", 500)
    return Task(
        name=name,
        images=images,
        labels=labels,
        head=make_heads()[name],
        class_names=CLASS_NAMES[name],
        mean=IMAGE_MEAN,
        std=IMAGE_STD,
    )


def build(out: Path, console: Console) -> None:
    """Trains, rounds, writes and validates all models.

    Args:
      out: folder for the weights, the heads and the record of the training.
      console: takes progress and scores.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "heads.safetensors").write_bytes(safetensors.save(make_heads()))
    tasks = [_validation_task(name) for name in TASK_NAMES]
    data = make_data(TASK_NAMES, MILD, PRETRAIN.n_images)
    base, losses = train(initial_params(_SEED), data, PRETRAIN, jax.random.key(_SEED))
    base = _save(out / "base.safetensors", base)
    before = evaluate_tasks(base, CONFIG, tasks)
    console.print(f"pre-trained: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    after: dict[str, float] = {}
    for index, task in enumerate(tasks):
        key = jax.random.fold_in(jax.random.key(_SEED + 1), index)
        start = {name: jnp.asarray(value) for name, value in base.items()}
        tuned, _ = train(start, make_data([task.name], None, FINETUNE.n_images), FINETUNE, key)
        rounded = _save(out / f"{task.name}.safetensors", tuned)
        after |= evaluate_tasks(rounded, CONFIG, [task])
        console.print(f"{task.name}: {before[task.name]:.3f} before, {after[task.name]:.3f} after")
    record = {
        "seed": _SEED,
        "pretrain": dataclasses.asdict(PRETRAIN) | {"nuisance": dataclasses.asdict(MILD)},
        "finetune": dataclasses.asdict(FINETUNE),
        "nuisance": {name: dataclasses.asdict(nuisance) for name, nuisance in HARD.items()},
        "validation": {"pretrained": before, "individual": after},
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "optax": optax.__version__},
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Train the built-in checkpoints.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    build(parser.parse_args().out, Console(stderr=True))


if __name__ == "__main__":
    main()
