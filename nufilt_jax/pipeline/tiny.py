"""The built-in study: merges the built-in checkpoints by several rules and measures them all."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nufilt_jax import methods
from nufilt_jax.analysis.plots import draw_accuracy_matrix
from nufilt_jax.checkpoints import load
from nufilt_jax.checkpoints.place import read_json, write_json
from nufilt_jax.errors import MissingExtraError
from nufilt_jax.evaluation import Task, accuracy_matrix, average_accuracy, backward_transfer, evaluate_tasks
from nufilt_jax.pipeline.examples import write_examples
from nufilt_jax.presets import TINY_CONFIG, Preset, shuffled
from nufilt_jax.zoo import TinyZoo, materialise

EVALUATION = "evaluation.json"
PICTURE = "accuracy_matrix.png"
COMPARED = ("sum", "weight_average", "task_arithmetic")


def tiny_preset(order: int | None, folder: Path | None = None, *, examples: bool = False) -> Preset:
    """The built-in checkpoints, written to `folder` or the user's cache on first use; order 1 unless told otherwise.

    With `examples`, the test draw's images are written too, for the methods that learn from them.
    """
    zoo = materialise(folder)
    tasks = [(name, str(path)) for name, path in zoo.tasks.items()]
    data = write_examples(zoo.folder / "examples", zoo.evaluation_tasks()) if examples else None
    return Preset(str(zoo.base), shuffled(tasks, 1 if order is None else order), TINY_CONFIG, data)


class TinyStudy:
    """Evaluates a merge of built-in checkpoints, and its alternatives beside it."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._zoo: TinyZoo = materialise()
        self._base = load(str(self._zoo.base))
        self._config = read_json(self._zoo.base / "config.json")
        self._tasks: tuple[Task, ...] = self._zoo.evaluation_tasks(names)
        self._names = names
        self.warnings: list[str] = []

    def evaluate(self, params: Mapping[str, Any]) -> dict[str, float]:
        """Test accuracy in [0, 1] by task."""
        return evaluate_tasks(params, self._config, self._tasks)

    def finish(self, folder: Path, recipe: dict[str, Any]) -> None:
        """Writes the comparison and the picture into an output folder."""
        merged = [step["accuracy"] for step in recipe["steps"]]
        seconds = sum(step["seconds"] for step in recipe["steps"])
        models = [
            self._row("pre-trained", self.evaluate(self._base)),
            self._row("individual", {n: self.evaluate(load(str(self._zoo.tasks[n])))[n] for n in self._names}),
            *(self._alternative(method) for method in COMPARED if method != recipe["method"]),
            self._merged_row(recipe["method"], merged, seconds),
        ]
        write_json(folder / EVALUATION, {"tasks": list(self._names), "models": models})
        try:
            title = f"{recipe['method']}: accuracy after each step"
            draw_accuracy_matrix(accuracy_matrix(merged, self._names), self._names, folder / PICTURE, title=title)
        except MissingExtraError as error:
            self.warnings += [str(problem) for problem in error.problems]

    def _alternative(self, method: str) -> dict[str, Any]:
        rule = methods.get(method)
        state, scores, seconds = rule.init(self._base), [], 0.0
        for name in self._names:
            task = load(str(self._zoo.tasks[name]))
            start = time.perf_counter()
            state = rule.update(state, task)
            merged = {key: np.asarray(value) for key, value in state.merged.items()}
            seconds += time.perf_counter() - start
            scores.append(self.evaluate(merged))
        return self._merged_row(method, scores, seconds)

    def _merged_row(self, method: str, scores: list[dict[str, float]], seconds: float) -> dict[str, Any]:
        matrix = accuracy_matrix(scores, self._names)
        return {
            "name": method,
            "accuracy": scores[-1],
            "acc": average_accuracy(matrix),
            "bwt": backward_transfer(matrix),
            "seconds": round(seconds, 3),
        }

    @staticmethod
    def _row(name: str, accuracy: dict[str, float]) -> dict[str, Any]:
        mean = float(np.mean(list(accuracy.values())))
        return {"name": name, "accuracy": accuracy, "acc": mean, "bwt": None, "seconds": None}
