"""The merged model for those who write it: each tensor is made when it is asked for, so that one is in memory."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from nufilt_jax.checkpoints.maps import drop_pages
from nufilt_jax.linalg.factored import Factored, dense
from nufilt_jax.methods.stacked import Params, Tensor
from nufilt_jax.methods.state import merged_tensor, whole_delta
from nufilt_jax.output.stored import Stored

_ROWS_BYTES = 1 << 23  # of what is made at once: larger arrays the C library fetches anew from the system, page by page
_LARGE = 1 << 22  # numbers of a tensor from which on a program that is compiled for it pays
_TYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


class MergedTensor:
    """θ0 + D of one tensor, not added yet; what takes arrays takes this for one.

    Attributes:
      shape: of the tensor.
      dtype: float32, or float64 if θ0 is that.
    """

    def __init__(self, name: str, base: Tensor, delta: Mapping[str, Tensor]) -> None:
        self.shape, self.dtype = base.shape, np.dtype(np.float64 if base.dtype == np.float64 else np.float32)
        self._name, self._base, self._delta = name, base, delta

    def made(self) -> np.ndarray:
        """The tensor, some rows at a time: whole, its summands would need as much again."""
        delta = whole_delta(self._delta, self._name, self._base)
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

    def in_parts(self, dtype: np.dtype) -> Iterator[tuple[np.ndarray, bool]] | None:
        """A large matrix in the type to be written, some rows at a time, as `checkpoints.outputs` takes it.

        A compiled program adds and rounds on all cores, the next rows while those before are written; numbers so small
        that float32 has them with fewer digits become 0 there. None of what numpy does as well.
        """
        types = [np.dtype(x) for x in _TYPES]
        cpu = _cpu()
        if cpu is None or len(self.shape) != 2 or math.prod(self.shape) < _LARGE:
            return None
        return self._rounded(dtype, cpu) if self._base.dtype in types and dtype in types else None

    def _rounded(self, dtype: np.dtype, cpu: Any) -> Iterator[tuple[np.ndarray, bool]]:
        delta = whole_delta(self._delta, self._name, self._base)
        n_rows = _divisor(self.shape[0], max(1, _ROWS_BYTES // (4 * self.shape[1])))
        if isinstance(delta, Factored):
            delta = Factored(delta.basis, jax.device_put(delta.rows, cpu))  # once: every part needs all of them
        coming: list[tuple[jax.Array, jax.Array]] = []
        for start in range(0, self.shape[0], n_rows):
            part = slice(start, start + n_rows)
            rows = Factored(delta.basis[part], delta.rows) if isinstance(delta, Factored) else delta[part]
            with jax.default_device(cpu):
                coming.append(_summed(self._base[part], rows, dtype=dtype))
            if len(coming) > 1:
                yield _fetched(*coming.pop(0))
        yield _fetched(*coming.pop())
        drop_pages(self._base)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """For numpy."""
        return self.made().astype(dtype or self.dtype, copy=False)


@functools.partial(jax.jit, static_argnames="dtype")
def _summed(base: jax.Array, delta: Any, *, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """θ0 + D in float32, rounded once; and by row the largest number before that."""
    total = base.astype(jnp.float32) + (dense(delta) if isinstance(delta, Factored) else delta)
    # What is no number here is nothing that rounding made, and would hide what rounding does.
    finite = jnp.where(jnp.isfinite(total), jnp.abs(total), 0)
    return total.astype(dtype), jnp.max(finite, axis=1)


def _fetched(rounded: jax.Array, largest: jax.Array) -> tuple[np.ndarray, bool]:
    found = np.asarray(rounded)
    with np.errstate(over="ignore"):
        return found, bool(np.isinf(np.max(np.asarray(largest)).astype(found.dtype)))


@functools.cache
def _cpu() -> Any:
    """The CPU as a device; None if JAX is kept from it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n up to `most`, so that one program serves all parts; if it is small, `most` itself."""
    found = max(x for x in range(1, min(n, most) + 1) if n % x == 0)
    return found if 4 * found >= min(n, most) else most


def merged_tensors(base: Params, delta: Mapping[str, Tensor]) -> dict[str, MergedTensor]:
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

    def __getitem__(self, layer: str) -> Tensor:
        return self._stored.deltas([layer])[layer]

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, str) and self._stored.holds(layer)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored.layers)

    def __len__(self) -> int:
        return len(self._stored.layers)
