"""One method along one stream in one order: what the tables are made of."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from measure import Json
from streams import Params, Stream

from nufilt_jax import methods
from nufilt_jax.config import LearningConfig, MethodConfig, OtherParams
from nufilt_jax.evaluation import accuracy_matrix, average_accuracy, backward_transfer
from nufilt_jax.methods.state import MergeState
from nufilt_jax.pipeline.timing import CompileLog
from nufilt_jax.presets import shuffled
from nufilt_jax.zoo.draws import Split


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method with its settings, as one row of a table.

    Attributes:
      method: name in the registry.
      config: its settings.
      other_params: what becomes of parameters outside the selected layers.
      label: of the row.
    """

    method: str
    config: MethodConfig
    other_params: OtherParams = "pretrained"
    label: str = ""

    def as_dict(self) -> Json:
        """What identifies its results."""
        return {"method": self.method, "config": dataclasses.asdict(self.config), "other_params": self.other_params}


def merge(stream: Stream, setting: Setting, order: int, *, splits: Sequence[Split] = ("test",)) -> Json:
    """Merges all tasks and scores every task when it is merged and at the end: all that ACC and BWT need.

    Args:
      stream: the tasks.
      setting: the method.
      order: the paper's k-th shuffle of the tasks.
      splits: draws to score on.

    Returns:
      Settings, order, scores by draw, and the seconds of every update without compilation.
    """
    names = shuffled(stream.tasks, order)
    rule = methods.get(setting.method, setting.config, other_params=setting.other_params)
    state = rule.init(stream.model("base"))
    scores: dict[Split, list[dict[str, float]]] = {split: [] for split in splits}
    seconds, merged = [], stream.model("base")
    for index, name in enumerate(names):
        data = _examples(stream, setting, name, order) if methods.RULES[setting.method].needs_data else None
        task, log = stream.model(name), CompileLog()
        with log.listening():
            start = time.perf_counter()
            state = rule.update(state, task, data=data)
            jax.block_until_ready((state.delta, state.added))
            wall = time.perf_counter() - start
        seconds.append(round(wall - log.as_dict()["seconds"], 4))
        merged = merged_params(state)
        for split in splits:
            scores[split].append(stream.scores(merged, names if index + 1 == len(names) else [name], split))
    measured = {split: _measures(scores[split], names) for split in splits}
    return setting.as_dict() | {
        "order": order,
        "tasks": list(names),
        "scores": measured,
        "seconds": seconds,
        "parameters": sum(value.size for value in merged.values()),
    }


def find_run(runs: Sequence[Json], setting: Setting, order: int) -> Json | None:
    """The stored run of a setting, if there is one."""
    wanted = setting.as_dict() | {"order": order}
    return next((run for run in runs if all(run[key] == value for key, value in wanted.items())), None)


def merged_params(state: MergeState) -> Params:
    """The merged model on the host."""
    return {name: np.asarray(value) for name, value in state.merged.items()}


def _examples(stream: Stream, setting: Setting, name: str, order: int) -> methods.TaskData:
    return stream.examples(name, cast(LearningConfig, setting.config), seed=order)


def _measures(scores: list[dict[str, float]], names: Sequence[str]) -> dict[str, Any]:
    matrix = accuracy_matrix(scores, names)
    return {
        "acc": average_accuracy(matrix),
        "bwt": backward_transfer(matrix),
        "when_merged": dict(zip(names, np.diagonal(matrix).tolist(), strict=True)),
        "at_the_end": scores[-1],
    }
