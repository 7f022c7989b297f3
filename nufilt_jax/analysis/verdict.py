"""What a merge did, in sentences: what was kept, what was lost, which layers conflict."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nufilt_jax.analysis.losses import known_mean
from nufilt_jax.evaluation.metrics import of_examples

_NOTICED = 0.01  # share of right answers from which a loss is told of
_LAYERS = 3  # so many are named
_PLAIN = ("pre-trained", "individual")  # rows of models that are no merges
# A finished merge is not measured at its earlier steps any more, hence another folder.
_LOST_UNKNOWN = (
    "What was lost since each task was merged is not known: the same merge with --evaluate, into another folder, "
    "measures after every step."
)
MEASURES = (
    "ACC is the mean accuracy on all tasks after the last step. BWT is how much the accuracy on earlier tasks changed "
    "since each was merged, on average: what is below 0 was forgotten."
)


def verdict(document: Mapping[str, Any], compared: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Sentences for the top of a report.

    Args:
      document: of `document.make_document`.
      compared: rows of `evaluation.json`, of this merge and of other models; may be empty.
    """
    rows = {row["name"]: row["acc"] for row in compared}
    told_above = (document["accuracy"] or {}).get("acc")
    own = rows.pop(document["method"], told_above)
    if not document["accuracy"] and own is None:
        return ["Nothing was evaluated: nufilt evaluate measures the model on its tasks.", *_conflicts(document)]
    kept = _kept(document) if document["accuracy"] else []
    told = kept + _beside(own, rows, is_known=told_above is not None)
    if not kept and len(document["tasks"]) > 1:
        told.append(_LOST_UNKNOWN)
    if document["limit"] is not None:
        told.append(f"All scores are{of_examples(document['limit'])} of each task.")
    return told + _conflicts(document)


def _kept(document: Mapping[str, Any]) -> list[str]:
    """Of every task, what it had when it was merged and what is left of it."""
    tasks = document["tasks"]
    matrix = np.array(document["accuracy"]["matrix"], np.float64)  # None becomes NaN
    first, last = np.diagonal(matrix), matrix[:, -1]
    known = [i for i in range(len(tasks) - 1) if np.isfinite(first[i]) and np.isfinite(last[i])]
    if not known:
        return []
    change = last[known] - first[known]
    kept = [tasks[i] for i, x in zip(known, change, strict=True) if x > -_NOTICED]
    lost = sorted((x, tasks[i]) for i, x in zip(known, change, strict=True) if x <= -_NOTICED)
    told = [f"{len(kept)} of {len(known)} earlier tasks kept what they had when they were merged, within a point."]
    if lost:
        named = ", ".join(f"{name} {-100 * x:.1f}" for x, name in lost)
        told.append(f"Lost since, in points of accuracy: {named}.")
    return told


def _beside(own: float | None, rows: Mapping[str, float], *, is_known: bool) -> list[str]:
    """Where the merge stands between the models that it came from, and beside other merges.

    Args:
      own: ACC of the merge; None if that is not known.
      rows: ACC of other models, by name.
      is_known: whether the reader knows the merge's own.
    """
    if own is None:
        return []
    told = []
    if set(_PLAIN) <= rows.keys() and rows["individual"] > rows["pre-trained"]:
        least, most = rows["pre-trained"], rows["individual"]
        ends = f"{100 * least:.1f} % of the pre-trained model and {100 * most:.1f} % of each task's own model"
        share = (own - least) / (most - least)
        where = f"between {ends}: {100 * share:.0f} % of the way"
        if not 0 <= share <= 1:
            where = f"{'below' if share < 0 else 'above'} both {ends}"
        told.append(f"ACC is {100 * own:.1f} %, {where}.")
    elif not is_known:
        told.append(f"ACC is {100 * own:.1f} %.")
    others = {name: acc for name, acc in rows.items() if name not in _PLAIN}
    if others:
        best = max(others, key=lambda name: others[name])
        told.append(f"The best other merge measured is {best}, with {100 * others[best]:.1f} %.")
    return told


def _conflicts(document: Mapping[str, Any]) -> list[str]:
    """The layers in which new tasks want the directions that earlier ones use."""
    found = document["forecast"]
    if not found:
        return []
    shares = known_mean(np.array(found["values"]["removed_share"], np.float64), axis=0)
    # Stable: of equal shares the first layers are named, always the same.
    ranked = [i for i in np.argsort(-np.nan_to_num(shares), kind="stable") if np.isfinite(shares[i])][:_LAYERS]
    if not ranked:
        return []
    named = ", ".join(f"{found['layers'][i]} ({100 * shares[i]:.0f} %)" for i in ranked)
    told = f"Most in conflict, by the share of a task's change that lies along directions of earlier tasks: {named}."
    return [told]
