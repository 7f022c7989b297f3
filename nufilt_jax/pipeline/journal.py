"""What a run has done, on paper and on disk."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from nufilt_jax.checkpoints.place import OutputPlace
from nufilt_jax.methods.state import MergeState
from nufilt_jax.pipeline.timing import Clock


class Journal:
    """Recipe and forecast as they grow. Each step is made durable in the background, one at a time and in order.

    Leaving the context waits for the step under way, so that what is merged is kept however a run ends.
    """

    def __init__(self, place: OutputPlace, recipe: dict[str, Any], forecast: dict[str, Any], clock: Clock) -> None:
        self.recipe, self.forecast, self.clock = recipe, forecast, clock
        self._place = place
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._last: Future[None] | None = None

    def begin(self) -> None:
        """Records what earlier runs have done, or nothing: whether the disk takes it is known before any work."""
        self._place.record(self.recipe, self.forecast, None)

    def add(self, entry: dict[str, Any], forecast: dict[str, Any], state: MergeState) -> None:
        """Adds a step and begins to write its state; raises what went wrong with the step before."""
        self.recipe["steps"].append(entry)
        self.forecast["steps"].append(forecast)
        recipe, told = ({**document, "steps": [*document["steps"]]} for document in (self.recipe, self.forecast))
        with self.clock.spent_on("copy_state"):
            self.wait()
            # A copy: the next step takes the memory of D.
            delta = state.delta.copied().on_host()
            arrays = {"delta": delta, "extra": dict(state.extra), "added": dict(state.added)}
            self._last = self._pool.submit(self._write, recipe, told, arrays)

    def _write(self, recipe: dict[str, Any], forecast: dict[str, Any], arrays: dict[str, Any]) -> None:
        with self.clock.spent_on("write_state"):
            self._place.record(recipe, forecast, arrays)

    def wait(self) -> None:
        """Returns when all steps are durable.

        Raises:
          OutputError: the last one cannot be written.
        """
        last, self._last = self._last, None
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
