"""Settings of every data-free method for the built-in study, chosen by its validation draw.

The paper's settings are for towers of 768 and more inputs, and 8 to 20 tasks. Here every method starts from them, its
ranks scaled to the study's width, and its settings are tried one after another: the best value of each is kept before
the next is tried. Two orders, which the tables do not use; no image of the test draw is looked at.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.common import measure, records, script
from benchmarks.common.runs import Setting, mean_scores, merge
from benchmarks.common.streams import Stream, StudyStream
from nufilt_jax import methods
from nufilt_jax.methods import RULES

RESULTS = records.RESULTS / "study_settings.json"
ORDERS = (6, 7)
PUBLISHED_WIDTH = 768  # of ViT-B, for which Table 9 (arXiv:2509.21413v2) gives its ranks
CLOSED_FORM = "nufilt, closed form"
OTHER_PARAMS = "other_params"
COLUMNS = ("row", "setting", "value", "ACC %", "BWT %", "s per task")

SCALES = (0.1, 0.2, 0.5)
FILTER_RANKS = (32, 64, 96, 128)
GRIDS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "null_space": {"filter_rank": FILTER_RANKS},
    "adapter_only": {"filter_rank": (64, 96), "task_rank": (1, 8)},
    "nufilt": {
        "filter_rank": FILTER_RANKS,
        "task_rank": (1, 8, 16, 32),
        "steps": (25, 100),
        OTHER_PARAMS: ("average",),
    },
    CLOSED_FORM: {
        "filter_rank": FILTER_RANKS,
        "task_rank": (1, 8, 16, 32, 64),
        "ridge": (0.3, 3.0),
        OTHER_PARAMS: ("average",),
    },
    "task_arithmetic": {"scale": SCALES},
    "ties": {"scale": SCALES, "density": (0.1, 0.4)},
    "knots": {"scale": SCALES, "density": (0.1, 0.4)},
    "magmax": {"scale": (0.3, 0.8)},
    "iso_c": {"scale": (0.5, 0.8, 1.2)},
    "tsv_m": {"scale": (0.3, 0.6)},
    "opcm": {"alpha": (0.3, 0.7, 0.9)},
    "wudi": {"steps": (25, 100), "learning_rate": (1e-4,)},
}


def published(width: int) -> dict[str, Setting]:
    """Every method with the settings of Table 9 for 8 tasks, ranks in proportion to the width; one entry per row."""
    found = {name: Setting(name, _scaled(name, width), label=name) for name in RULES}
    closed = dataclasses.replace(_scaled("nufilt", width), solver="closed_form")
    found[CLOSED_FORM] = Setting("nufilt", closed, label=CLOSED_FORM)
    return found


def _scaled(method: str, width: int) -> Any:
    config = methods.find(method).config()
    ranks = [field.name for field in dataclasses.fields(config) if field.name.endswith("_rank")]
    if method == "wemoe":  # its ranks are of feed-forward task vectors, and part of its parameter count
        ranks = []
    return dataclasses.replace(
        config, **{name: max(1, round(getattr(config, name) * width / PUBLISHED_WIDTH)) for name in ranks}
    )


def choose(stream: Stream, start: Setting, grid: Mapping[str, Sequence[Any]]) -> tuple[Setting, list[list[Any]]]:
    """Coordinate by coordinate, the setting of the highest mean ACC on the validation draw.

    Returns:
      The setting, and one row of results for each that was tried.
    """
    acc, row = _try(stream, start, "as published", None)
    best, rows = start, [row]
    for name, values in grid.items():
        around = best
        for value in values:
            candidate = _with(around, name, value)
            if candidate == around:
                continue
            found, row = _try(stream, candidate, name, value)
            rows.append(row)
            if found > acc:
                best, acc = candidate, found
    return best, rows


def _with(setting: Setting, name: str, value: Any) -> Setting:
    if name == OTHER_PARAMS:
        return dataclasses.replace(setting, other_params=value)
    return dataclasses.replace(setting, config=dataclasses.replace(setting.config, **{name: value}))


def _try(stream: Stream, setting: Setting, name: str, value: Any) -> tuple[float, list[Any]]:
    """Mean ACC over the orders, and the row that says so."""
    runs = [merge(stream, setting, order, splits=("val",)) for order in ORDERS]
    acc, bwt = mean_scores(runs, "val")
    script.say(f"{setting.label}: {name} {value}: {acc:.2f} {bwt:+.2f}")
    return acc, [setting.label, name, value, acc, bwt, float(np.median(runs[-1]["seconds"]))]


def chosen(width: int) -> dict[str, Setting]:
    """The stored choice; a method that was not swept keeps the published settings.

    Raises:
      FileNotFoundError: there is none.
    """
    stored = json.loads(RESULTS.read_text())["chosen"]
    found = published(width)
    for label, entry in stored.items():
        config = methods.find(entry["method"]).config(**entry["config"])
        found[label] = Setting(entry["method"], config, entry["other_params"], label)
    return found


def main() -> None:
    """Parses the command line."""
    parser = script.Parser(__doc__, RESULTS.name)
    parser.add_argument("--rows", nargs="+", choices=GRIDS, default=list(GRIDS), metavar="ROW", help=", ".join(GRIDS))
    parser.add_argument("--images", type=script.at_least(1), default=500, help="per task (default: 500)")
    options = parser.parse_args()
    stream = StudyStream(n_images=options.images)
    start = published(stream.config["hidden_size"])
    kept, rows = {}, []
    for label in options.rows:
        best, tried = choose(stream, start[label], GRIDS[label])
        kept[label] = best.as_dict()
        rows += tried
    document = {
        "benchmark": "study_settings",
        "chosen": kept,
        "environment": measure.environment(),
        "settings": {"draw": "validation", "images": options.images, "orders": ORDERS},
        "tables": [records.table("Settings for the study, by its validation draw", COLUMNS, rows)],
    }
    records.finish(document, options.json or RESULTS)


if __name__ == "__main__":
    main()
