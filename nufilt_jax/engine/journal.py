"""What a run has done, on paper and on disk."""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from nufilt_jax.engine.timing import Clock
from nufilt_jax.linalg.dispatch import on_cpu
from nufilt_jax.methods.state import MergeState
from nufilt_jax.output.place import OutputPlace


class Journal:
    """Recipe and forecast as they grow. Each step is made durable in the background, one at a time and in order.

    Leaving the context waits for the step under way, so that what is merged is kept however a run ends.

    Attributes:
      recipe: as it will be published.
      forecast: likewise.
      clock: gets the time of what is done here.
      under_way: the step that is being written, or was last; None if none is waited for.
      write_seconds: what the last state took to write; infinite before the first.
    """

    def __init__(self, place: OutputPlace, recipe: dict[str, Any], forecast: dict[str, Any], clock: Clock) -> None:
        self.recipe, self.forecast, self.clock = recipe, forecast, clock
        self._place = place
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self.under_way: Future[None] | None = None
        self.write_seconds = math.inf

    def begin(self) -> None:
        """Records what earlier runs have done, or nothing: whether the disk takes it is known before any work."""
        self._place.record(self.recipe, self.forecast, None)

    def add(self, entry: dict[str, Any], forecast: dict[str, Any], state: MergeState, *, copy: bool) -> None:
        """Adds a step and begins to write its state; raises what went wrong with the step before.

        Args:
          entry: the step in the recipe.
          forecast: the step in the forecast.
          state: after it.
          copy: write from a copy of D. Without one, D must be left alone until `wait` returns.
        """
        self.recipe["steps"].append(entry)
        self.forecast["steps"].append(forecast)
        recipe, told = ({**document, "steps": [*document["steps"]]} for document in (self.recipe, self.forecast))
        with self.clock.spent_on("copy_state"):
            self.wait()
            delta = state.delta.on_host()
            if copy and on_cpu(state.delta):  # elsewhere it is one
                delta = jax.tree.map(np.copy, delta)
            arrays = {"delta": delta, "extra": dict(state.extra), "added": dict(state.added)}
            self.under_way = self._pool.submit(self._write, recipe, told, arrays)

    def _write(self, recipe: dict[str, Any], forecast: dict[str, Any], arrays: dict[str, Any]) -> None:
        start = time.perf_counter()
        try:
            self._place.record(recipe, forecast, arrays)
        finally:
            arrays.clear()  # before anybody hears that this is done: the next step can take no memory that is in use
            self.write_seconds = time.perf_counter() - start
            self.clock.add("write_state", self.write_seconds)

    def wait(self) -> None:
        """Returns when all steps are durable.

        Raises:
          OutputError: the last one cannot be written.
        """
        last, self.under_way = self.under_way, None
        if last is not None:
            last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None:
            self.wait()
