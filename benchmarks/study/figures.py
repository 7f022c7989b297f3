"""The figures of the paper (arXiv:2509.21413v2) on the built-in study, from one command each: numbers and pictures.

python -m benchmarks.study.figures --figure 2  affinity of data and task vectors, and its distribution (and Figs. 6-8)
python -m benchmarks.study.figures --figure 4  ACC and BWT of NUFILT against each of its ranks
python -m benchmarks.study.figures --figure 5  stability and plasticity losses of the data-free methods after every step

The pictures stand beside the results file. All settings of a rank run in one compiled program.
"""

import argparse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from benchmarks.common import measure, records, script
from benchmarks.common.records import Json
from benchmarks.common.runs import Scores
from benchmarks.common.streams import ORDERS, Stream, StudyStream
from benchmarks.study import study_settings
from benchmarks.study.rank_figure import rank_figure
from benchmarks.study.rank_sweep import Ranks, figure_4, merge_settings
from nufilt_jax import methods
from nufilt_jax.analysis import affinity, losses, plots
from nufilt_jax.analysis.figures import as_png
from nufilt_jax.analysis.layers import LAYER_GROUPS, in_group
from nufilt_jax.commands.measured import measure as measure_stream
from nufilt_jax.evaluation.clip.images import TaskImages
from nufilt_jax.presets import shuffled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SYMBOLS = {"filter_rank": "r_p", "adapter_rank": "r_l", "task_rank": "r_v"}
UNIT = "share of ‖τ x‖²"


class Drawn(NamedTuple):
    """One figure of the paper: its numbers, and pictures by name."""

    tables: list[Json]
    pictures: "Mapping[str, Figure]"


def main() -> None:
    """Parses the command line."""
    script.prepare_process()
    parser = script.Parser(__doc__, "figure_NUMBER_study.json")
    parser.add_argument("--figure", type=int, choices=(2, 4, 5), required=True)
    parser.add_argument(
        "--orders", type=script.at_least(1), nargs="+", default=list(ORDERS), help="default: 1 to 5; 5 takes the first"
    )
    parser.add_argument("--images", type=script.at_least(1), default=500, help="per task (default: 500)")
    options = parser.parse_args()
    path = options.json or records.RESULTS / f"figure_{options.figure}_study.json"
    with parser.refusals():
        drawn = draw(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.pictures.items():
        path.with_name(f"{path.stem}_{name}.png").write_bytes(as_png(figure))
    settings = script.settings(options)
    document = {"benchmark": "figures", "environment": measure.environment(), "settings": settings}
    records.finish(document | {"tables": drawn.tables}, path)


def draw(options: argparse.Namespace) -> Drawn:
    """The figure asked for."""
    stream = StudyStream(n_images=options.images)
    if options.figure == 4:
        return ranks(stream, options.orders)
    names = shuffled(stream.tasks, options.orders[0])
    images = stream.images(names)
    return affinities(stream, names, images) if options.figure == 2 else all_losses(stream, names, images)


def ranks(stream: Stream, orders: Iterable[int]) -> Drawn:
    """Fig. 4: means over orders."""
    curves, tables = {}, []
    for field, settings in figure_4(stream.config["hidden_size"]).items():
        script.say(SYMBOLS[field])
        scores = np.mean([_scores(stream, settings, order) for order in orders], axis=0)
        varied = [getattr(setting, field) for setting in settings]
        held = [(SYMBOLS[key], value) for key, value in settings[0]._asdict().items() if key != field]
        label = f"{SYMBOLS[field]} ({', '.join(f'{symbol} = {value}' for symbol, value in held)})"
        curves[label] = (varied, scores[:, 0].tolist(), scores[:, 1].tolist())
        rows = [[rank, *pair] for rank, pair in zip(varied, (100 * scores).tolist(), strict=True)]
        tables.append(records.table(f"Fig. 4, {stream.name}: {label}", ("rank", "ACC %", "BWT %"), rows))
    return Drawn(tables, {"ranks": rank_figure(curves, title=f"Ranks of NUFILT, {stream.name}")})


def _scores(stream: Stream, settings: tuple[Ranks, ...], order: int) -> list[tuple[float, float]]:
    """ACC and BWT of every setting."""
    names = shuffled(stream.tasks, order)
    scores = [Scores(stream, names) for _ in settings]
    tasks = (stream.model(name) for name in names)
    for models in merge_settings(stream.model("base"), tasks, settings):
        for found, model in zip(scores, models, strict=True):
            found.add({key: np.asarray(x) for key, x in model.items()})
    measured = [found.as_dict() for found in scores]
    return [(one["acc"], one["bwt"]) for one in measured]


def affinities(stream: Stream, names: tuple[str, ...], images: list[TaskImages]) -> Drawn:
    """Figs. 2 and 6 to 8: they are of task vectors, which no merge changes."""
    models = [stream.model(name) for name in names]
    found = measure_stream(stream.model("base"), models, stream.config, images, {})
    tables, pictures = [], {}
    for group in LAYER_GROUPS:
        values = found.affinities[:, :, in_group(found.layers, group)]
        own, other = (float(np.mean(part)) for part in affinity.own_and_cross(values))
        tables.append([group, own, other, found.random])
        pictures[group.replace(" ", "_").lower()] = plots.affinity_figure(
            values, names, group=group, random=found.random
        )
    pictures["distribution"] = plots.affinity_curves(found.affinities, found.layers, random=found.random)
    columns = ("layers", "own task", "other tasks", "random subspaces")
    return Drawn([records.table(f"Fig. 2, {stream.name}: mean affinity", columns, tables)], pictures)


def all_losses(stream: Stream, names: tuple[str, ...], images: list[TaskImages]) -> Drawn:
    """Fig. 5, of every method that needs no data, with the settings of Table 9."""
    settings = study_settings.published(stream.config["hidden_size"])
    chosen = {label: row for label, row in settings.items() if _is_data_free(row.method)}
    rules = {label: methods.get(row.method, row.config, other_params=row.other_params) for label, row in chosen.items()}
    models = [stream.model(name) for name in names]
    found = measure_stream(stream.model("base"), models, stream.config, images, rules)
    steps = {label: losses.per_step(losses.relative(row)) for label, row in found.losses.items()}
    rows = [
        [label, *(float(losses.known_mean(getattr(row, name), axis=0)) for name in row._fields)]
        for label, row in steps.items()
    ]
    title = f"Fig. 5, {stream.name}: mean over steps, {UNIT}"
    table = records.table(title, ("method", "stability", "plasticity", "harmonic mean"), rows)
    return Drawn([table], {"losses": plots.loss_figure(steps, names, unit=UNIT)})


def _is_data_free(method: str) -> bool:
    rule = methods.find(method)
    return not (rule.needs_data or rule.adds_parameters)


if __name__ == "__main__":
    main()
