"""The data-free forecast of a merge as arrays, and how well it tells what is measured afterwards."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

# What `forecast.json` says of a layer, and in words.
QUANTITIES = {
    "removed_share": "removed by the filter, share of ‖τ‖²",
    "restored_share": "added by the adapter, share of ‖τ‖²",
    "drift": "drift on kept directions, share of ‖D V₂‖²",
    "captured_share": "held by kept directions, share of ‖D‖²",
}
_FEWEST = 3  # pairs below which a rank correlation says nothing


class Agreement(NamedTuple):
    """Spearman's rank correlations of a forecast with what was measured; NaN where there are too few pairs.

    Attributes:
      by_step: over the layers of each step.
      pooled: over all steps and layers at once.
    """

    by_step: Float[np.ndarray, " steps"]
    pooled: float


def forecast_layers(forecast: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Every layer that any step of a forecast speaks of.

    Args:
      forecast: the `steps` of `forecast.json`.
    """
    return tuple(dict.fromkeys(name for step in forecast for name in step["layers"]))


def forecast_values(
    forecast: Sequence[Mapping[str, Any]], quantity: str, layers: Sequence[str]
) -> Float[np.ndarray, "steps layers"]:
    """One of `QUANTITIES`; NaN where the forecast says nothing, as of the first step."""
    rows = [[step["layers"].get(name, {}).get(quantity) for name in layers] for step in forecast]
    return np.array(rows, dtype=np.float64).reshape(len(forecast), len(layers))  # two axes also of none


def added_share(
    values: Mapping[str, Float[np.ndarray, "steps layers"]],
) -> Float[np.ndarray, "steps layers"]:
    """What a step adds in all, share of ‖τ‖²: what the filter leaves, and what the adapter adds.

    Args:
      values: `forecast_values` by quantity; `removed_share` and `restored_share` are needed.

    Returns:
      NaN where either is not known.

    >>> added_share({"removed_share": np.array([[0.75]]), "restored_share": np.array([[0.125]])}).tolist()
    [[0.375]]
    """
    return 1 - values["removed_share"] + values["restored_share"]


def layer_agreement(told: Float[np.ndarray, "steps layers"], measured: Float[np.ndarray, "steps layers"]) -> Agreement:
    """Whether the layers for which most is forecast are those in which most is measured.

    Args:
      told: for instance the forecast drift.
      measured: for instance the stability loss, `losses.layer_stability`.
    """
    by_step = [rank_correlation(*rows) for rows in zip(told, measured, strict=True)]
    return Agreement(np.array(by_step), rank_correlation(told.ravel(), measured.ravel()))


def accuracy_lost(accuracies: Float[np.ndarray, "n_tasks n_tasks"]) -> Float[np.ndarray, " n_tasks"]:
    """What each step cost the tasks merged before it, mean over them; NaN at the first step.

    Args:
      accuracies: a[i, t] on task i after step t.

    >>> accuracy_lost(np.array([[0.75, 0.5], [0.25, 1.0]])).tolist()
    [nan, 0.25]
    """
    steps = range(1, len(accuracies))
    return np.array([np.nan, *(np.mean(accuracies[:t, t - 1] - accuracies[:t, t]) for t in steps)])


def rank_correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Spearman's ρ of the pairs that are known; NaN for fewer than 3, or where one side is constant.

    >>> rank_correlation(np.array([1.0, 2.0, 9.0]), np.array([2.0, 3.0, 4.0]))
    1.0
    """
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    if len(a) < _FEWEST or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    from scipy.stats import rankdata  # half a second, which merges that only draw a picture need not wait for

    ranks = rankdata(a), rankdata(b)  # ties share a rank
    return float(np.corrcoef(*ranks)[0, 1])
