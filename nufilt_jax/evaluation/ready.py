"""What a task looks like to whoever evaluates models: a name, a size and a score, whatever it is made of."""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from jax.typing import ArrayLike

# Told after every batch: the task's name, how many of its examples are done, and how many there are.
OnBatch = Callable[[str, int, int], None]


def evenly_spread(n_rows: int, limit: int | None) -> list[int]:
    """At most `limit` of the rows 0 to `n_rows - 1`, evenly spread; None for all.

    >>> evenly_spread(10, 4)
    [0, 2, 5, 7]
    """
    n_chosen = n_rows if limit is None else min(limit, n_rows)
    return [number * n_rows // n_chosen for number in range(n_chosen)]


@runtime_checkable
class ReadyTask(Protocol):
    """A task whose data set was found and fits the model; examples are read when it is scored."""

    @property
    def name(self) -> str:
        """Key of its score."""
        ...

    @property
    def n_examples(self) -> int:
        """How many examples a score is made of."""
        ...

    def score(self, params: Mapping[str, ArrayLike], *, on_batch: OnBatch | None = None) -> float:
        """The task's metric, in [0, 1] (a correlation: in [-1, 1]).

        Args:
          params: flat dict under canonical names.
          on_batch: told how far it is.

        Raises:
          CheckpointError: parameters and config do not fit.
          ConfigError: an example cannot be read.
        """
        ...
