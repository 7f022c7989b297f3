"""The merged model for those who write it: each tensor is made when it is asked for, so that one is in memory."""

from typing import Any

import numpy as np

from nufilt_jax.methods.stacked import Array
from nufilt_jax.methods.state import MergeState, merged_tensor

_ROWS_BYTES = 1 << 24  # of what is made at once


class MergedTensor:
    """θ0 + D of one tensor in float32, not added yet; what takes arrays takes this for one.

    Attributes:
      shape: of the tensor.
      dtype: float32.
    """

    def __init__(self, base: Array, delta: Array) -> None:
        self.shape, self.dtype = delta.shape, np.dtype(np.float32)
        self._base, self._delta = base, delta

    def made(self) -> np.ndarray:
        """The tensor, some rows at a time: whole, its summands would need as much again."""
        result = np.empty(self.shape, self.dtype)
        if not self.shape:
            return np.asarray(merged_tensor(self._base, self._delta, self.dtype))
        n_rows = max(1, _ROWS_BYTES * self.shape[0] // max(1, result.nbytes))
        for start in range(0, self.shape[0], n_rows):
            rows = slice(start, start + n_rows)
            result[rows] = merged_tensor(self._base[rows], self._delta[rows], self.dtype)
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """For numpy."""
        return self.made().astype(dtype or self.dtype, copy=False)


def merged_tensors(state: MergeState) -> dict[str, MergedTensor]:
    """The touched tensors of a state, by canonical name: rounded once, when written."""
    return {name: MergedTensor(state.base[name], delta) for name, delta in state.delta.on_host().items()}
