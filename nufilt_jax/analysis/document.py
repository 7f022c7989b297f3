"""What is known of a merge, as one JSON document: `analysis.json`, from which pictures and report are made."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from nufilt_jax.analysis import affinity, losses
from nufilt_jax.analysis.forecast import (
    QUANTITIES,
    accuracy_lost,
    added_share,
    forecast_layers,
    forecast_values,
    layer_agreement,
    rank_correlation,
)
from nufilt_jax.analysis.layers import LAYER_GROUPS, in_group
from nufilt_jax.evaluation import average_accuracy, backward_transfer


class Measured(NamedTuple):
    """What was measured on images of the tasks.

    Attributes:
      images: how many of each task.
      layers: all linear layers, of which the affinities are.
      ranks: directions of each of them.
      random: the affinity of random subspaces.
      affinities: of task i's data with task j's vector.
      merged_layers: the layers of which the losses are: those that every method below works on.
      losses: by method.
    """

    images: int
    layers: tuple[str, ...]
    ranks: tuple[int, ...]
    random: float
    affinities: Float[np.ndarray, "tasks tasks layers"]
    merged_layers: tuple[str, ...]
    losses: Mapping[str, losses.TaskLosses]


def make_document(
    *,
    tasks: Sequence[str],
    method: str,
    forecast: Sequence[Mapping[str, Any]],
    accuracies: Float[np.ndarray, "tasks tasks"] | None,
    measured: Measured | None,
    missing: Mapping[str, str],
    limit: int | None = None,
) -> dict[str, Any]:
    """Puts everything together; a part that is not known is None.

    Args:
      tasks: names in the order merged.
      method: of the merge.
      forecast: the `steps` of `forecast.json`.
      accuracies: a[i, t] on task i after step t; None where nothing was evaluated.
      measured: on images; None where there are none.
      missing: why a part is not known, by its name here.
      limit: at most so many examples of each task were scored; None for all.
    """
    told = {
        "accuracy": None if accuracies is None else _accuracy(accuracies),
        "forecast": _forecast(forecast),
        "affinity": None if measured is None else _affinity(measured),
        "losses": None if measured is None or method not in measured.losses else _losses(measured),
        "forecast_check": _check(forecast, accuracies, measured, method),
    }
    images = None if measured is None else measured.images
    head = {"tasks": list(tasks), "method": method, "images": images, "limit": limit}
    return {**head, **told, "missing": dict(missing)}


def as_json(x: Float[np.ndarray, "..."]) -> Any:
    """Nested lists, in which None stands for NaN."""
    # JSON has no NaN: strict readers refuse the word that Python writes for it.
    return np.where(np.isnan(x), np.array(None, object), x.astype(object)).tolist()


def as_array(x: Any) -> Float[np.ndarray, "..."]:
    """The array again."""
    return np.array(x, dtype=np.float64)


def _accuracy(accuracies: Float[np.ndarray, "tasks tasks"]) -> dict[str, Any]:
    is_complete = not np.isnan(np.triu(accuracies)).any()  # what comes before a task's own step enters neither mean
    return {
        "matrix": as_json(accuracies),
        "lost": as_json(accuracy_lost(accuracies)),
        "acc": average_accuracy(accuracies) if is_complete else None,
        "bwt": backward_transfer(accuracies) if is_complete else None,
    }


def _forecast(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    layers = forecast_layers(steps)
    values = {quantity: forecast_values(steps, quantity, layers) for quantity in QUANTITIES}
    if all(np.isnan(cells).all() for cells in values.values()):
        return None
    return {
        "layers": list(layers),
        "values": {quantity: as_json(cells) for quantity, cells in values.items()},
        "mean": {quantity: as_json(losses.known_mean(cells, axis=1)) for quantity, cells in values.items()},
        "near_equal_cuts": [len(step["near_equal_cuts"]) for step in steps],
    }


def _affinity(measured: Measured) -> dict[str, Any]:
    def group(name: str) -> dict[str, Any]:
        values = measured.affinities[:, :, in_group(measured.layers, name)]
        found = affinity.summarise(values)
        own, cross = (as_json(losses.known_mean(part, axis=0)) for part in affinity.own_and_cross(values))
        high = f"percentile_{affinity.PERCENTILE}"
        return {"mean": as_json(found.mean), high: as_json(found.high), "own_mean": own, "cross_mean": cross}

    return {
        "layers": list(measured.layers),
        "ranks": list(measured.ranks),
        "random": measured.random,
        "values": as_json(measured.affinities),
        "groups": {name: group(name) for name in LAYER_GROUPS},
    }


def _losses(measured: Measured) -> dict[str, Any]:
    def method(found: losses.TaskLosses) -> dict[str, Any]:
        whole = {"absolute": found, "relative": losses.relative(found)}
        return {name: as_json(value) for name, value in found._asdict().items()} | {
            unit: {name: _per_step(value, measured.merged_layers, name) for name in LAYER_GROUPS}
            for unit, value in whole.items()
        }

    return {
        "layers": list(measured.merged_layers),
        "methods": {name: method(found) for name, found in measured.losses.items()},
    }


def _per_step(found: losses.TaskLosses, layers: Sequence[str], group: str) -> dict[str, Any]:
    steps = losses.per_step(found, in_group(layers, group))
    return {name: as_json(values) for name, values in steps._asdict().items()}


def _check(
    forecast: Sequence[Mapping[str, Any]],
    accuracies: Float[np.ndarray, "tasks tasks"] | None,
    measured: Measured | None,
    method: str,
) -> dict[str, Any] | None:
    """Rank correlations of the forecast with what was measured; None where none can be told."""
    told: dict[str, Any] = {}
    if not forecast:
        return None
    if measured is not None and method in measured.losses:
        found = losses.relative(measured.losses[method])
        shares = {quantity: forecast_values(forecast, quantity, measured.merged_layers) for quantity in QUANTITIES}
        stability = losses.layer_stability(found)
        pairs = {
            "drift_and_stability": (shares["drift"], stability),
            "added_share_and_stability": (added_share(shares), stability),
            "removed_share_and_plasticity": (shares["removed_share"], found.plasticity),
        }
        for name, (told_before, values) in pairs.items():
            agreement = layer_agreement(told_before, values)
            if not np.isnan(agreement.pooled):
                told[name] = {"by_step": as_json(agreement.by_step), "pooled": agreement.pooled}
    if accuracies is not None:
        drift = losses.known_mean(forecast_values(forecast, "drift", forecast_layers(forecast)), axis=1)
        if not np.isnan(pooled := rank_correlation(drift, accuracy_lost(accuracies))):
            told["drift_and_accuracy_lost"] = {"by_step": None, "pooled": pooled}
    return told or None
