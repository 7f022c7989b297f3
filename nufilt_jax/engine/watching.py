"""Who is told how a run goes on, and who scores what it makes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from nufilt_jax.methods.state import LayerReport
from nufilt_jax.output.recipe import Recipe, Step


class Scorer(Protocol):
    """Scores the merged model; see `engine.evaluation`."""

    def entry(self, params: Mapping[str, Any], task: str) -> dict[str, Any]:
        """What the recipe's entry of a step gets."""
        ...

    def covers(self, step: Step) -> bool:
        """Whether a step holds what `entry` would say."""
        ...

    def finish(self, folder: Path, recipe: Recipe) -> None:
        """Adds files to the finished folder before it gets its name."""
        ...


@runtime_checkable
class Watcher(Protocol):
    """Is told how a run goes on."""

    def cell(self, task: str, window: str, done: int, total: int) -> None:
        """A cell begins, after `done` of `total`; `window` is empty if there is one only."""
        ...

    def stack(self, description: str, report: LayerReport) -> None:
        """A group of layers is solved."""
        ...

    def compiling(self, program: str) -> None:
        """A program is about to be compiled, or looked for among those that were."""
        ...

    def merged(self) -> None:
        """All cells are done; what is left is to write, and to measure for comparison."""
        ...

    def phase(self, description: str) -> None:
        """Something else begins."""
        ...
