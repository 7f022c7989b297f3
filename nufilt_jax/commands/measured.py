"""What a merge does to images of its tasks: affinities, and the losses of merges done over again in memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nufilt_jax import methods
from nufilt_jax.analysis.affinity import (
    affinity_rows,
    all_data_directions,
    default_rank,
    random_level,
    vector_directions,
)
from nufilt_jax.analysis.document import Measured
from nufilt_jax.analysis.losses import TaskLosses, join, task_losses
from nufilt_jax.evaluation.clip.images import TaskImages
from nufilt_jax.evaluation.moments import layer_input_moments, tower_layers
from nufilt_jax.methods.stacked import Params

Matrices = dict[str, np.ndarray]


def measure(
    base: Params,
    models: Sequence[Params],
    config: Mapping[str, Any],
    tasks: Sequence[TaskImages],
    rules: Mapping[str, methods.Merger],
) -> Measured:
    """Merges the models by every rule, and measures affinities and losses.

    The moments of one task at a time are in memory, and D after every step of every rule.

    Args:
      base: θ0, of a CLIP vision tower.
      models: θ_t, in the order merged.
      config: `config.json` of all of them.
      tasks: images of each model's task.
      rules: by name; none for affinities alone. They need no data and add no parameters.
    """
    widths = tower_layers(config)
    layers, ranks = tuple(widths), tuple(default_rank(n) for n in widths.values())
    vectors = [_difference(model, base, layers) for model in models]
    used = [
        {name: vector_directions(vector[name], default_rank(widths[name])) for name in layers} for vector in vectors
    ]
    deltas = {name: _deltas(rule, base, models, layers) for name, rule in rules.items()}
    shared = tuple(name for name in layers if all(name in steps[0] for steps in deltas.values()))
    rows, losses = [], {name: list[TaskLosses]() for name in rules}
    for step, (model, task) in enumerate(zip(models, tasks, strict=True)):
        moments = layer_input_moments(model, config, task.images, mean=task.mean, std=task.std)
        rows.append(affinity_rows(all_data_directions(moments.second), used, layers))
        second = {name: np.asarray(x) for name, x in moments.second.items()}
        for name, found in losses.items():
            how: dict[str, Any] = {"step": step, "deltas": deltas[name], "vector": vectors[step], "layers": shared}
            found.append(task_losses(second, moments.tokens, **how))
    return Measured(
        images=len(tasks[0].images),
        layers=layers,
        ranks=ranks,
        random=random_level(ranks, tuple(widths.values())),
        affinities=np.stack(rows),
        merged_layers=shared,
        losses={name: join(found) for name, found in losses.items()},
    )


def _difference(model: Params, base: Params, layers: Sequence[str]) -> Matrices:
    pairs = ((name, np.asarray(model[name], np.float32), np.asarray(base[name], np.float32)) for name in layers)
    return {name: theirs - ours for name, theirs, ours in pairs}


def _deltas(rule: methods.Merger, base: Params, models: Sequence[Params], layers: Sequence[str]) -> list[Matrices]:
    """D of the linear layers that the rule touches, after every step."""
    state, steps = rule.init(base), list[Matrices]()
    for model in models:
        state = rule.update(state, model)
        steps.append({name: np.asarray(state.delta[name]) for name in layers if name in state.delta})
    return steps
