"""The merged model for those who write it: each tensor is made when it is asked for, so that one is in memory."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nufilt_jax.checkpoints.tensors import drop_pages
from nufilt_jax.linalg.factored import Factored
from nufilt_jax.methods.stacked import Array, Params
from nufilt_jax.methods.state import joined, merged_tensor
from nufilt_jax.output.stored import Stored

_ROWS_BYTES = 1 << 24  # of what is made at once


class MergedTensor:
    """θ0 + D of one tensor, not added yet; what takes arrays takes this for one.

    Attributes:
      shape: of the tensor.
      dtype: float32, or float64 if θ0 is that.
    """

    def __init__(self, name: str, base: Array, delta: Mapping[str, Array]) -> None:
        self.shape, self.dtype = base.shape, np.dtype(np.float64 if base.dtype == np.float64 else np.float32)
        self._name, self._base, self._delta = name, base, delta

    def made(self) -> np.ndarray:
        """The tensor, some rows at a time: whole, its summands would need as much again."""
        delta = joined(self._delta, self._name, self._base)
        if not self.shape:
            return np.asarray(merged_tensor(self._base, delta, self.dtype))
        result = np.empty(self.shape, self.dtype)
        n_rows = max(1, _ROWS_BYTES * self.shape[0] // max(1, result.nbytes))
        for start in range(0, self.shape[0], n_rows):
            rows = slice(start, start + n_rows)
            part = delta.outputs(rows) if isinstance(delta, Factored) else delta[rows]
            result[rows] = merged_tensor(self._base[rows], part, self.dtype)
        drop_pages(self._base)  # else a model that is written would be in memory at its end
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """For numpy."""
        return self.made().astype(dtype or self.dtype, copy=False)


def merged_tensors(base: Params, delta: Mapping[str, Array]) -> dict[str, MergedTensor]:
    """The touched tensors, by canonical name: rounded once, when written.

    Args:
      base: θ0 of the touched tensors.
      delta: D by layer; on the host.
    """
    return {name: MergedTensor(name, tensor, delta) for name, tensor in base.items()}


class StoredDelta(Mapping[str, Any]):  # not of arrays: a type checker at run time would read one
    """D by layer, each read from disk when it is asked for."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    def __getitem__(self, layer: str) -> Array:
        return self._stored.deltas([layer])[layer]

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, str) and self._stored.holds(layer)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored.layers)

    def __len__(self) -> int:
        return len(self._stored.layers)
