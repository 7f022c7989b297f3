"""The built-in study: merges the built-in checkpoints by several rules and measures them all."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from nufilt_jax import methods
from nufilt_jax.checkpoints import load
from nufilt_jax.config import ComputeType
from nufilt_jax.engine.examples import write_examples
from nufilt_jax.engine.scores import ScoreRow, merged_row, plain_row
from nufilt_jax.engine.timing import CompileLog
from nufilt_jax.evaluation import Task, evaluate_tasks
from nufilt_jax.evaluation.ready import OnBatch, ReadyTask, evenly_spread
from nufilt_jax.evaluation.suite import Suite
from nufilt_jax.presets import TINY_CONFIG, Preset, shuffled
from nufilt_jax.zoo import materialise
from nufilt_jax.zoo.draws import require_originals
from nufilt_jax.zoo.families import FAMILIES, Family
from nufilt_jax.zoo.store import N_IMAGES, evaluation_tasks

COMPARED = ("sum", "weight_average", "task_arithmetic")
_DTYPE = "torch_dtype"  # which a merge may change


def tiny_preset(order: int | None, folder: Path | None = None, *, examples: bool = False) -> Preset:
    """The built-in checkpoints, written to `folder` or the user's cache on first use; order 1 unless told otherwise.

    With `examples`, the test draw's images are written too, for the methods that learn from them.
    """
    zoo = materialise(folder)
    tasks = [(name, str(path)) for name, path in zoo.tasks.items()]
    data = write_examples(zoo.folder / "examples", zoo.evaluation_tasks()) if examples else None
    return Preset(str(zoo.base), shuffled(tasks, 1 if order is None else order), TINY_CONFIG, data)


def built_in_family(config: Mapping[str, Any]) -> Family | None:
    """The built-in family whose models have this `config.json`, and so know its tasks; None for other models."""
    for family in FAMILIES.values():
        if {**config, _DTYPE: family.config[_DTYPE]} == family.config:
            return family
    return None


@dataclasses.dataclass(frozen=True)
class _BuiltInTask:
    """A task whose images are drawn when it is first scored, and stay in memory."""

    name: str
    family: Family
    limit: int | None
    config: Mapping[str, Any]
    dtype: ComputeType

    @property
    def n_examples(self) -> int:
        return len(evenly_spread(N_IMAGES, self.limit))

    @functools.cached_property
    def _drawn(self) -> Task:
        (task,) = evaluation_tasks((self.name,), family=self.family)
        rows = evenly_spread(N_IMAGES, self.limit)
        return dataclasses.replace(task, images=task.images[rows], labels=task.labels[rows])

    def score(self, params: Mapping[str, ArrayLike], *, on_batch: OnBatch | None = None) -> float:
        if on_batch is not None:
            on_batch(self.name, 0, self.n_examples)
        return evaluate_tasks(params, self.config, [self._drawn], dtype=self.dtype)[self.name]


def built_in_tasks(
    names: Sequence[str], config: Mapping[str, Any], *, limit: int | None, dtype: ComputeType
) -> dict[str, ReadyTask]:
    """A built-in model's tasks; their test images are drawn.

    Args:
      names: of its tasks.
      config: its `config.json`, see `built_in_family`.
      limit: at most so many images of each task, evenly spread; None for all.
      dtype: in which the forward pass computes.

    Raises:
      MissingExtraError: `digits` needs scikit-learn.
    """
    family = built_in_family(config)
    assert family is not None  # for the type checker: the caller has asked
    require_originals(names)
    return {name: _BuiltInTask(name, family, limit, config, dtype) for name in names}


class TinyStudy:
    """The models beside which a merge of the built-in ones stands."""

    def __init__(self, names: Sequence[str], suite: Suite) -> None:
        """Takes the tasks in the order merged, and the same opened."""
        self._names, self._suite = names, suite
        self._zoo = materialise()
        self._base = load(str(self._zoo.base))

    def rows(self, method: str, tell: Callable[[str], None]) -> list[ScoreRow]:
        """Scores of the base, of each task's own model, and of merges by other methods than `method`.

        Args:
          method: which the merge has used.
          tell: is told how far it is.
        """
        tell("for comparison: measuring base and tasks")
        individual = {task.name: task.score(self._model(task.name)) for task in self._suite.tasks}
        return [
            plain_row("pre-trained", self._suite.score(self._base)),
            plain_row("individual", individual),
            *(self._alternative(other, tell) for other in COMPARED if other != method),
        ]

    def _model(self, name: str) -> Mapping[str, np.ndarray]:
        return load(str(self._zoo.tasks[name]))

    def _alternative(self, method: str, tell: Callable[[str], None]) -> ScoreRow:
        rule = methods.get(method)
        state, scores, seconds, compiled = rule.init(self._base), list[dict[str, float]](), 0.0, CompileLog()
        for number, name in enumerate(self._names, 1):
            tell(f"for comparison: {method}, {name} ({number} of {len(self._names)})")
            task = self._model(name)
            start = time.perf_counter()
            with compiled.listening():
                state = rule.update(state, task)
                merged = {key: np.asarray(value) for key, value in state.merged.items()}
            seconds += time.perf_counter() - start
            # Of the steps before the last, backward transfer needs the score on their own task alone.
            asked = [task for task in self._suite.tasks if name in (task.name, self._names[-1])]
            scores.append(Suite(asked).score(merged))
        return merged_row(method, scores, self._names, seconds, compiled.seconds)
