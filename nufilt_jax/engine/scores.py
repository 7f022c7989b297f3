"""What `evaluation.json` holds of each model: one row of scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nufilt_jax.evaluation import accuracy_matrix, average_accuracy, backward_transfer

ScoreRow = dict[str, Any]


def plain_row(name: str, accuracy: Mapping[str, float]) -> ScoreRow:
    """A model that is no merge."""
    mean = float(np.mean(list(accuracy.values())))
    return {"name": name, "accuracy": dict(accuracy), "acc": mean, "bwt": None, "seconds": None, "compile": None}


def merged_row(
    name: str, scores: Sequence[Mapping[str, float]], tasks: Sequence[str], seconds: float, compiling: float
) -> ScoreRow:
    """A merge, by what was measured after every step; `bwt` is None if a step was not evaluated on its own task.

    Args:
      name: of the merge.
      scores: of each step.
      tasks: in order.
      seconds: that merging took.
      compiling: how many of them went into compiling.
    """
    matrix = accuracy_matrix(scores, tasks)
    return {
        "name": name,
        "accuracy": dict(scores[-1]),
        "acc": average_accuracy(matrix),
        "bwt": None if np.isnan(np.diagonal(matrix)).any() else backward_transfer(matrix),
        "seconds": round(seconds, 3),
        "compile": round(compiling, 3),
    }
