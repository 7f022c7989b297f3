"""How well the data-free forecast of NUFILT tells what is measured afterwards, on the built-in study.

Spearman's rank correlations. By layer: what is forecast of a layer at a step, and its stability loss (Eq. 3,
arXiv:2509.21413v2) on images of the tasks merged before; all layers and steps of a merge, mean over orders. By step:
the mean forecast over layers, and how much accuracy the step costs the tasks merged before; steps of all orders.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from benchmarks.common import measure, records, script
from benchmarks.common.runs import Setting, merged_params
from benchmarks.common.streams import ORDERS, StudyStream
from benchmarks.study import study_settings
from benchmarks.study.study_settings import CLOSED_FORM
from nufilt_jax import methods
from nufilt_jax.analysis import losses
from nufilt_jax.analysis.forecast import (
    QUANTITIES,
    accuracy_lost,
    added_share,
    forecast_values,
    layer_agreement,
    rank_correlation,
)
from nufilt_jax.commands.measured import measure as measure_stream
from nufilt_jax.engine.records import forecast_entry
from nufilt_jax.evaluation import accuracy_matrix
from nufilt_jax.presets import shuffled

RESULTS = records.RESULTS / "forecast_study.json"
ADDED = "added_share"
FORECASTS = {**QUANTITIES, ADDED: "added in all, share of ‖τ‖²"}
ROWS = ("nufilt", CLOSED_FORM)
COLUMNS = ("method", "forecast", "by layer: stability loss", "by step: accuracy lost")


class Checked(NamedTuple):
    """One merge: what was forecast, by quantity, and what was measured."""

    told: dict[str, Float[np.ndarray, "steps layers"]]
    stability: Float[np.ndarray, "steps layers"]
    lost: Float[np.ndarray, " steps"]


def main() -> None:
    """Parses the command line."""
    script.prepare_process()
    parser = script.Parser(__doc__, RESULTS.name)
    parser.add_argument("--orders", type=script.at_least(1), nargs="+", default=list(ORDERS), help="default: 1 to 5")
    parser.add_argument("--images", type=script.at_least(1), default=500, help="per task (default: 500)")
    options = parser.parse_args()
    stream = StudyStream(n_images=options.images)
    published = study_settings.published(stream.config["hidden_size"])
    rows = []
    for label in ROWS:
        merges = [check(stream, published[label], order) for order in options.orders]
        rows += [[label, words, *_agreement(merges, quantity)] for quantity, words in FORECASTS.items()]
    title = f"The forecast against measurements: rank correlations, {len(options.orders)} orders"
    settings = script.settings(options)
    document = {"benchmark": "forecast_check", "environment": measure.environment(), "settings": settings}
    records.finish(document | {"tables": [records.table(title, COLUMNS, rows)]}, options.json or RESULTS)


def check(stream: StudyStream, setting: Setting, order: int) -> Checked:
    """Merges in one order, and measures every task after every step."""
    script.say(f"{setting.label}: order {order}")
    names = shuffled(stream.tasks, order)
    rule = methods.get(setting.method, setting.config, other_params=setting.other_params)
    base, models = stream.model("base"), [stream.model(name) for name in names]
    state, told, scores = rule.init(base), [], []
    for step, model in enumerate(models):
        state = rule.update(state, model)
        told.append({"task": names[step], **forecast_entry(state.report)})
        scores.append(stream.scores(merged_params(state), names[: step + 1]))
    found = measure_stream(base, models, stream.config, stream.images(names), {setting.label: rule})
    forecasts = {quantity: forecast_values(told, quantity, found.merged_layers) for quantity in QUANTITIES}
    forecasts[ADDED] = added_share(forecasts)
    return Checked(
        forecasts,
        losses.layer_stability(losses.relative(found.losses[setting.label])),
        accuracy_lost(accuracy_matrix(scores, names)),
    )


def _agreement(merges: Sequence[Checked], quantity: str) -> list[float | None]:
    """By layer and by step; None where there is nothing to correlate."""
    by_layer = [layer_agreement(merge.told[quantity], merge.stability).pooled for merge in merges]
    by_step = [losses.known_mean(merge.told[quantity], axis=1) for merge in merges]
    lost = np.concatenate([merge.lost for merge in merges])
    found = float(np.mean(by_layer)), rank_correlation(np.concatenate(by_step), lost)
    return [None if np.isnan(value) else value for value in found]


if __name__ == "__main__":
    main()
