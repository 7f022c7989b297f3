"""What the PyTorch contenders share: their arrays, their results, and a clock that waits for the device."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

Tensor = Any  # torch.Tensor; the type checker runs without torch


class Tensors(NamedTuple):
    """`Inputs` on the device."""

    merged: dict[str, Tensor]
    task: dict[str, Tensor]
    start: dict[str, Tensor]


class Outcome(NamedTuple):
    """One solve.

    Attributes:
      updates: τ (P + BA) by layer, still on the device.
      stages: seconds of decompose, reduce, adam and fuse, as far as they are apart, and of their total.
    """

    updates: dict[str, Tensor]
    stages: dict[str, float]


class Contender(NamedTuple):
    """A solve that can be run again and again.

    Attributes:
      run: solves once.
      notes: what was chosen by trial.
    """

    run: Callable[[], Outcome]
    notes: dict[str, Any]


class Clock:
    """Seconds of consecutive stages, each waited for."""

    def __init__(self, device: str) -> None:
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self._wait()
        self._start = self._last = time.perf_counter()
        self.stages: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Ends a stage; time of a stage with several laps adds up."""
        self._wait()
        now = time.perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self._last
        self._last = now
        self.stages["total"] = now - self._start


def to_numpy(updates: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The updates as arrays of the host."""
    return {name: update.cpu().numpy() for name, update in updates.items()}
