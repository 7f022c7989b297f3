"""One method along one stream in one order: what the tables are made of."""

import dataclasses
import time
from collections.abc import Sequence
from typing import cast

import jax
import numpy as np

from benchmarks.common.records import Json
from benchmarks.common.streams import Params, Stream
from nufilt_jax import methods
from nufilt_jax.config import MethodConfig, OtherParams
from nufilt_jax.engine.timing import CompileLog
from nufilt_jax.evaluation import accuracy_matrix, average_accuracy, backward_transfer
from nufilt_jax.methods.adaptation import LearningConfig
from nufilt_jax.methods.state import MergeState
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


def references(stream: Stream) -> dict[str, dict[str, float]]:
    """Accuracies without merging: of the pre-trained model, and of each task's own on it."""
    individual = {name: stream.scores(stream.model(name), [name])[name] for name in stream.tasks}
    return {"pre-trained": stream.scores(stream.model("base"), stream.tasks), "individual": individual}


class Scores:
    """Accuracies of one merge, all that ACC and BWT need: of every task when it is merged and at the end.

    Args:
      stream: the tasks.
      names: in the order merged.
      split: draw to score on.
    """

    def __init__(self, stream: Stream, names: Sequence[str], split: Split = "test") -> None:
        self._stream, self._names = stream, names
        self._split: Split = split
        self._steps: list[dict[str, float]] = []

    def add(self, merged: Params) -> None:
        """Scores the model after the next step."""
        step = len(self._steps)
        wanted = self._names if step + 1 == len(self._names) else [self._names[step]]
        self._steps.append(self._stream.scores(merged, wanted, self._split))

    def as_dict(self) -> Json:
        """ACC, BWT and what they are made of, after the last step."""
        matrix = accuracy_matrix(self._steps, self._names)
        return {
            "acc": average_accuracy(matrix),
            "bwt": backward_transfer(matrix),
            "when_merged": dict(zip(self._names, np.diagonal(matrix).tolist(), strict=True)),
            "at_the_end": self._steps[-1],
        }


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
    scores = {split: Scores(stream, names, split) for split in splits}
    seconds, merged = [], stream.model("base")
    for name in names:
        data = _examples(stream, setting, name, order) if methods.RULES[setting.method].needs_data else None
        task, log = stream.model(name), CompileLog()
        with log.listening():
            start = time.perf_counter()
            state = rule.update(state, task, data=data)
            jax.block_until_ready((state.delta, state.added))
            wall = time.perf_counter() - start
        seconds.append(round(wall - log.as_dict()["seconds"], 4))
        merged = merged_params(state)
        for found in scores.values():
            found.add(merged)
    return setting.as_dict() | {
        "order": order,
        "tasks": list(names),
        "scores": {split: found.as_dict() for split, found in scores.items()},
        "seconds": seconds,
        "parameters": sum(value.size for value in merged.values()),
    }


def find_run(runs: Sequence[Json], setting: Setting, order: int) -> Json | None:
    """The stored run of a setting, if there is one."""
    wanted = setting.as_dict() | {"order": order}
    return next((run for run in runs if all(run[key] == value for key, value in wanted.items())), None)


def mean_scores(runs: Sequence[Json], split: Split = "test") -> tuple[float, float]:
    """ACC and BWT on one draw in percent, means over runs."""
    acc, bwt = (100 * float(np.mean([run["scores"][split][key] for run in runs])) for key in ("acc", "bwt"))
    return acc, bwt


def merged_params(state: MergeState) -> Params:
    """The merged model on the host."""
    return {name: np.asarray(value) for name, value in state.merged.items()}


def _examples(stream: Stream, setting: Setting, name: str, order: int) -> methods.TaskData:
    return stream.examples(name, cast(LearningConfig, setting.config), seed=order)
