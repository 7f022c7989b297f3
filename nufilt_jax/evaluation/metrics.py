"""Scores of a sequence of merges: average accuracy and backward transfer."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from nufilt_jax.errors import ConfigError, Problem


def accuracy_matrix(
    scores: Sequence[Mapping[str, float]], tasks: Sequence[str]
) -> Float[np.ndarray, "n_tasks n_tasks"]:
    """Arranges what was measured after every step.

    Args:
      scores: `scores[t]` holds accuracies by task name, in [0, 1], of the model after step `t`.
      tasks: names in the order in which they were merged.

    Returns:
      `a[i, t]`, the accuracy on task `i` after step `t`; NaN where it was not measured.

    Raises:
      ConfigError: the numbers of steps and tasks differ, or a score is of an unknown task.
    """
    if len(scores) != len(tasks):
        raise ConfigError(Problem("scores", f"{len(scores)} steps were scored, {len(tasks)} tasks were merged"))
    unknown = sorted({name for row in scores for name in row} - set(tasks))
    if unknown:
        raise ConfigError(Problem("scores", f"of tasks that were not merged: {', '.join(unknown)}"))
    columns = [[row.get(name, np.nan) for name in tasks] for row in scores]
    return np.array(columns, dtype=np.float64).reshape(len(tasks), len(tasks)).T


def of_examples(limit: int | None) -> str:
    """What is said of scores that were not taken on all examples.

    >>> f"accuracy{of_examples(3)}, %"
    'accuracy of at most 3 examples, %'
    """
    return "" if limit is None else f" of at most {limit} examples"


def average_accuracy(accuracies: Float[np.ndarray, "n_tasks n_tasks"]) -> float:
    """ACC: the mean over all tasks of the accuracy of the last model.

    Source: Qiu et al., arXiv:2509.21413v2, Sec. 5.1.

    >>> round(average_accuracy(np.array([[0.9, 0.6], [0.1, 0.8]])), 3)
    0.7
    """
    _require(accuracies, 1, accuracies[:, -1:])
    return float(accuracies[:, -1].mean())


def backward_transfer(accuracies: Float[np.ndarray, "n_tasks n_tasks"]) -> float:
    """BWT: how much accuracy on earlier tasks changed since they were merged; negative is forgetting.

    BWT = 1/(T-1) Σ_{i<T} [a_i(θ_T) − a_i(θ_i)]; the last task has nothing after it. Zero if T is 1.

    Source: Qiu et al., arXiv:2509.21413v2, Sec. 5.1.

    >>> round(backward_transfer(np.array([[0.9, 0.6], [0.1, 0.8]])), 3)
    -0.3
    """
    _require(accuracies, 1, accuracies[:, -1:], np.diagonal(accuracies))
    if len(accuracies) == 1:
        return 0.0
    return float((accuracies[:-1, -1] - np.diagonal(accuracies)[:-1]).mean())


def _require(accuracies: Float[np.ndarray, "..."], minimum: int, *used: Float[np.ndarray, "..."]) -> None:
    if len(accuracies) < minimum:
        raise ConfigError(Problem("scores", "there are none"))
    if any(np.isnan(part).any() for part in used):
        raise ConfigError(Problem("scores", "an accuracy that this metric needs was not measured"))
