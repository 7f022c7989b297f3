"""What might lift NUFILT on the built-in study, one lever at a time: layers, other parameters, ranks, size of a step.

The closed form in plain NumPy, where every layer may have ranks of its own; the first row is the package's, as a check.
Every lever is pulled from the chosen settings (benchmarks/study/study_settings.py), on the validation draw and in its
orders.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from benchmarks.common import measure, records, script
from benchmarks.common.runs import Scores, mean_scores, merge
from benchmarks.common.streams import Params, Stream, StudyStream
from benchmarks.study import study_settings
from benchmarks.study.study_settings import CLOSED_FORM, ORDERS
from nufilt_jax.config import OtherParams
from nufilt_jax.methods.nufilt import NufiltConfig
from nufilt_jax.methods.selection import published_layers
from nufilt_jax.presets import shuffled

RESULTS = records.RESULTS / "study_levers.json"
FC2 = re.compile(r"vision_model\.encoder\.layers\.\d+\.mlp\.fc2\.weight")

Matrix = Float[np.ndarray, "m n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lever:
    """One merge of the closed form.

    Attributes:
      filter_energy: share of ‖D‖² that V2 holds, layer by layer; None takes the chosen r_p.
      task_energy: share of ‖τ‖² that V1 holds; None takes the chosen r_v.
      scale: factor on every update after the first.
      with_fc2: merges the second feed-forward matrices too.
      other_params: what becomes of all else.
    """

    filter_energy: float | None = None
    task_energy: float | None = None
    scale: float = 1.0
    with_fc2: bool = False
    other_params: OtherParams = "pretrained"


LEVERS: Mapping[str, Lever] = {
    "as chosen": Lever(),
    "fc2 too": Lever(with_fc2=True),
    "other parameters: average": Lever(other_params="average"),
    "other parameters: first": Lever(other_params="first"),
    "r_p: 80 % of the energy of D": Lever(filter_energy=0.8),
    "r_p: 90 %": Lever(filter_energy=0.9),
    "r_p: 95 %": Lever(filter_energy=0.95),
    "r_v: 50 % of the energy of τ": Lever(task_energy=0.5),
    "r_v: 80 %": Lever(task_energy=0.8),
    "r_p: 90 %, r_v: 50 %": Lever(filter_energy=0.9, task_energy=0.5),
    "updates at 0.8": Lever(scale=0.8),
    "updates at 0.6": Lever(scale=0.6),
    "updates at 0.8, fc2 too": Lever(scale=0.8, with_fc2=True),
    "updates at 0.8, r_p: 80 %": Lever(scale=0.8, filter_energy=0.8),
}


def main() -> None:
    """Parses the command line."""
    script.prepare_process()
    parser = script.Parser(__doc__, RESULTS.name)
    parser.add_argument("--images", type=script.at_least(1), default=500, help="per task (default: 500)")
    options = parser.parse_args()
    stream = StudyStream(n_images=options.images)
    chosen = study_settings.chosen(stream.config["hidden_size"])[CLOSED_FORM]
    assert isinstance(chosen.config, NufiltConfig)
    package = [merge(stream, chosen, order, splits=("val",)) for order in ORDERS]
    rows = [["as chosen, the package", *mean_scores(package, "val")]]
    for label, lever in LEVERS.items():
        rows.append([label, *np.mean([scores(stream, lever, chosen.config, order) for order in ORDERS], axis=0)])
        script.say(f"{label}: {rows[-1][1]:.2f} {rows[-1][2]:+.2f}")
    config = dataclasses.asdict(chosen.config)
    settings = {"draw": "validation", "images": options.images, "orders": ORDERS, "config": config}
    document = {"benchmark": "study_levers", "environment": measure.environment(), "settings": settings}
    table = records.table("The closed form on the study's validation draw", ("lever", "ACC %", "BWT %"), rows)
    records.finish(document | {"tables": [table]}, options.json or RESULTS)


def scores(stream: Stream, lever: Lever, config: NufiltConfig, order: int) -> tuple[float, float]:
    """ACC and BWT of one merge, in percent."""
    base, names = stream.model("base"), shuffled(stream.tasks, order)
    selected = {name for name, x in base.items() if _is_merged(name, x.shape, lever)}
    delta: dict[str, np.ndarray] = {}
    found = Scores(stream, names, "val")
    for step, task in enumerate(names):
        model = stream.model(task)
        for name in base:
            tau = model[name] - base[name]
            if step == 0 and (name in selected or lever.other_params != "pretrained"):
                delta[name] = tau
            elif name in selected:
                delta[name] = delta[name] + lever.scale * update(delta[name], tau, lever, config)
            elif lever.other_params == "average":
                delta[name] = delta[name] + (tau - delta[name]) / (step + 1)
        merged: Params = {name: x + delta.get(name, np.float32(0)) for name, x in base.items()}
        found.add(merged)
    measured = found.as_dict()
    return 100 * measured["acc"], 100 * measured["bwt"]


def update(merged: Matrix, task: Matrix, lever: Lever, config: NufiltConfig) -> Matrix:
    """τ P + E of `core.closed_form`, in float64."""
    d, t = merged.astype(np.float64), task.astype(np.float64)
    v2 = _leading(d, config.filter_rank, lever.filter_energy)
    v1 = _leading(t, config.task_rank, lever.task_energy)
    filtered, free = t - (t @ v2) @ v2.T, v1 - v2 @ (v2.T @ v1)
    target = t @ v2 @ (v2.T @ v1) - d @ v1
    ridge = config.ridge * np.eye(free.shape[1])
    return (filtered + target @ np.linalg.solve(free.T @ free + ridge, free.T)).astype(np.float32)


def _leading(x: Matrix, rank: int, energy: float | None) -> Float[np.ndarray, "n r"]:
    """The first right singular vectors: so many, or so many as hold this share of ‖x‖²."""
    values, vectors = np.linalg.eigh(x.T @ x)
    if energy is not None:
        held = np.cumsum(values[::-1]) / np.sum(values)
        rank = int(np.searchsorted(held, energy)) + 1
    return vectors[:, ::-1][:, :rank]


def _is_merged(name: str, shape: tuple[int, ...], lever: Lever) -> bool:
    return published_layers(name, shape, "clip") or (lever.with_fc2 and FC2.fullmatch(name) is not None)


if __name__ == "__main__":
    main()
