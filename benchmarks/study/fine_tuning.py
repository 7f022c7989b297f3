"""How much the strength of fine-tuning decides: the study's tasks, fine-tuned at several learning rates, then merged.

Everything else stays: tasks, images, pre-trained tower, steps, orders, and every method's published settings, ranks in
proportion to the width. NUFILT also runs with those that validation chose at the study's own rate. Models that are not
there yet are trained first, ten for each rate.
"""

import dataclasses

import numpy as np
from rich.console import Console

from benchmarks.common import measure, records, script
from benchmarks.common.records import Json
from benchmarks.common.runs import mean_scores, merge, references
from benchmarks.common.streams import ORDERS, Stream, StudyStream
from benchmarks.study import study_settings
from benchmarks.study.study_settings import CLOSED_FORM
from nufilt_jax.methods.selection import published_layers
from nufilt_jax.zoo import STUDY, Family
from nufilt_jax.zoo.store import weights_folder
from nufilt_jax.zoo.train import build

RESULTS = records.RESULTS / "fine_tuning_study.json"
ROWS = ("weight_average", "sum", "null_space", "iso_c", "opcm", "nufilt", CLOSED_FORM)
TUNED = ("nufilt", CLOSED_FORM)
RATES = (1.5e-4, 5e-4)


def main() -> None:
    """Parses the command line."""
    script.prepare_process()
    parser = script.Parser(__doc__, RESULTS.name)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="peak learning rates of Adam")
    parser.add_argument("--orders", type=script.at_least(1), nargs="+", default=list(ORDERS), help="default: 1 to 5")
    parser.add_argument("--images", type=script.at_least(1), default=500, help="per task (default: 500)")
    options = parser.parse_args()
    build(STUDY, weights_folder(STUDY), Console(stderr=True))
    columns = {rate: _at(rate, options.orders, options.images) for rate in options.rates}
    rows = [[label, *(columns[rate][label] for rate in options.rates)] for label in next(iter(columns.values()))]
    title = f"The study at several learning rates of fine-tuning: ACC / BWT in %, {len(options.orders)} orders"
    table = records.table(title, ("", *(f"{rate:g}" for rate in options.rates)), rows)
    settings = script.settings(options)
    document: Json = {"benchmark": "fine_tuning", "environment": measure.environment(), "settings": settings}
    records.finish(document | {"tables": [table]}, options.json or RESULTS)


def at_rate(rate: float) -> Family:
    """The study with other fine-tuned models of the same base."""
    if rate == STUDY.finetune.learning_rate:
        return STUDY
    return dataclasses.replace(
        STUDY, name=f"{STUDY.name}-{rate:g}", finetune=dataclasses.replace(STUDY.finetune, learning_rate=rate)
    )


def _at(rate: float, orders: list[int], n_images: int) -> dict[str, str]:
    """One column: what the fine-tuned models are like, and what becomes of them."""
    family = at_rate(rate)
    build(family, weights_folder(family), Console(stderr=True), pretrained=weights_folder(STUDY))
    stream = StudyStream(family, n_images)
    found = {"‖τ‖ / ‖θ0‖ of the selected layers, %": f"{100 * _size(stream):.1f}"}
    found |= {label: f"{100 * np.mean(list(scores.values())):.1f}" for label, scores in references(stream).items()}
    published, chosen = (of(stream.config["hidden_size"]) for of in (study_settings.published, study_settings.chosen))
    settings = {label: published[label] for label in ROWS}
    settings |= {f"{label}, chosen by validation": chosen[label] for label in TUNED}
    for label, setting in settings.items():
        acc, bwt = mean_scores([merge(stream, setting, order) for order in orders])
        script.say(f"{rate:g}, {label}: {acc:.1f} {bwt:+.1f}")
        found[label] = f"{acc:.1f} / {bwt:+.1f}"
    return found


def _size(stream: Stream) -> float:
    """Of the task vectors, mean over tasks and layers, in proportion to the base's."""
    base = {name: x for name, x in stream.model("base").items() if published_layers(name, x.shape, "clip")}
    models = (stream.model(name) for name in stream.tasks)
    return float(
        np.mean([np.linalg.norm(model[name] - x) / np.linalg.norm(x) for model in models for name, x in base.items()])
    )


if __name__ == "__main__":
    main()
