"""What the rules are given that learn from a task's examples."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from nufilt_jax.methods.stacked import Params, Tensor

Batch = Any  # a pytree of arrays

Forward = Callable[[Params, Batch], Tensor]


class TaskData(NamedTuple):
    """Unlabelled examples of one task, and the model's answer to them.

    Attributes:
      batches: pytrees of arrays, alike in structure, shapes and dtypes; a rule takes one per step, so there must be as
        many as its `steps`.
      forward: `forward(params, batch)`, the logits [examples, classes] of a model whose parameters are given by
        canonical name. Pure and jittable; the same function for all tasks, so that it is compiled once: what differs
        between tasks, as the classes do, belongs in the batch.
    """

    batches: Iterator[Batch]
    forward: Forward
