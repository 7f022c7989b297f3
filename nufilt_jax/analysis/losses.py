"""Stability and plasticity losses on activations, from second moments of the inputs alone.

Source: Qiu et al., arXiv:2509.21413v2, Eqs. (3) and (4), squared ℓ2, layer by layer, as their surrogate Eq. (16) has
them. With x_i the inputs of a layer on task i's images, D_t = θ^m_t − θ0 and τ_t = θ_t − θ0:

    stability of task i at step t > i:  mean over tokens of ‖(θ^m_t − θ^m_{t−1}) x_i‖²
    plasticity at step t:               mean over tokens of ‖(θ^m_t − θ_t) x_t‖²

Both are of the form tr(Δ C Δᵀ) / tokens with C = XᵀX. The inputs x_i are those that the task's own fine-tuned model
gives the layer: they do not depend on the merge, so methods can be compared. Biases are left out.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class TaskLosses(NamedTuple):
    """Losses on the inputs of one task, or, with a leading axis over tasks, of all (`join`).

    Attributes:
      stability: of every step and layer; NaN up to the task's own step.
      plasticity: of the task's own step.
      size: ‖τ x‖², mean over tokens: what the task's fine-tuning changed.
    """

    stability: Float[np.ndarray, "*tasks steps layers"]
    plasticity: Float[np.ndarray, "*tasks layers"]
    size: Float[np.ndarray, "*tasks layers"]


class StepLosses(NamedTuple):
    """Means over layers, and of the stability over earlier tasks, step by step; NaN where there is no earlier task.

    Attributes:
      stability: what the step changed for the tasks before.
      plasticity: what it lacks of its own task.
      harmonic: the harmonic mean of both (Fig. 5).
    """

    stability: Float[np.ndarray, " steps"]
    plasticity: Float[np.ndarray, " steps"]
    harmonic: Float[np.ndarray, " steps"]


def response(change: Float[np.ndarray, "m n"], second: Float[np.ndarray, "n n"], tokens: int) -> float:
    """Mean over tokens of ‖Δ x‖², as tr(Δ C Δᵀ) / tokens.

    >>> x = np.array([[1.0, 2.0], [0.0, 1.0]])
    >>> response(np.array([[3.0, 0.0]]), x.T @ x, tokens=2)
    4.5
    """
    return float(np.sum((change @ second) * change, dtype=np.float64)) / tokens


def task_losses(
    second: Mapping[str, Float[np.ndarray, "_ _"]],
    tokens: int,
    *,
    step: int,
    deltas: Sequence[Mapping[str, Float[np.ndarray, "_ _"]]],
    vector: Mapping[str, Float[np.ndarray, "_ _"]],
    layers: Sequence[str],
) -> TaskLosses:
    """The losses of all steps on the inputs of the task that was merged at one of them.

    A task at a time, so that one task's moments need not wait for another's.

    Args:
      second: C = XᵀX by layer, on the task's images.
      tokens: rows of X.
      step: index of the step at which the task was merged.
      deltas: D after every step, by layer.
      vector: τ of the task, by layer.
      layers: which, in this order.
    """
    stability = np.full((len(deltas), len(layers)), np.nan)
    for later in range(step + 1, len(deltas)):
        changes = [deltas[later][name] - deltas[later - 1][name] for name in layers]
        stability[later] = [response(x, second[name], tokens) for x, name in zip(changes, layers, strict=True)]
    plasticity = [response(deltas[step][name] - vector[name], second[name], tokens) for name in layers]
    size = [response(vector[name], second[name], tokens) for name in layers]
    return TaskLosses(stability, np.array(plasticity), np.array(size))


def join(tasks: Sequence[TaskLosses]) -> TaskLosses:
    """The losses of all tasks, in the order in which they were merged."""
    return TaskLosses(*(np.stack(parts) for parts in zip(*tasks, strict=True)))


def relative(losses: TaskLosses) -> TaskLosses:
    """In units of ‖τ_i x_i‖², which makes layers comparable; NaN for layers that the task left as they were."""
    size = np.where(losses.size > 0, losses.size, np.nan)
    return TaskLosses(losses.stability / size[:, None], losses.plasticity / size, losses.size)


def layer_stability(losses: TaskLosses) -> Float[np.ndarray, "steps layers"]:
    """Stability losses of every step and layer, mean over the tasks merged before; NaN at the first step."""
    return known_mean(losses.stability, axis=0)


def per_step(losses: TaskLosses, chosen: Bool[np.ndarray, " layers"] | None = None) -> StepLosses:
    """Means over layers, all of them or those `chosen`."""
    stability, plasticity = losses.stability, losses.plasticity
    if chosen is not None:
        stability, plasticity = stability[..., chosen], plasticity[:, chosen]
    before, own = known_mean(known_mean(stability, axis=0), axis=1), known_mean(plasticity, axis=1)
    return StepLosses(before, own, harmonic_mean(before, own))


def harmonic_mean(a: Float[np.ndarray, "*shape"], b: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """2ab / (a + b); 0 where both are 0.

    >>> harmonic_mean(np.array([1.0, 0.0]), np.array([3.0, 0.0])).tolist()
    [1.5, 0.0]
    """
    total = a + b
    return 2 * a * b / np.where(total == 0, 1, total)


def known_mean(x: Float[np.ndarray, "..."], axis: int) -> Float[np.ndarray, "..."]:
    """Mean of what is not NaN; NaN, without a warning, where nothing else is."""
    known = ~np.isnan(x)
    count = known.sum(axis=axis)
    return np.where(count > 0, np.where(known, x, 0).sum(axis=axis) / np.maximum(count, 1), np.nan)
