"""A fine-tune that is told by its base and an adapter: W + s B A where there are factors."""

import dataclasses
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from nufilt_jax.checkpoints.dtypes import NumpyArray
from nufilt_jax.checkpoints.reader import Checkpoint
from nufilt_jax.checkpoints.tensors import TensorInfo, UnreadTensors

_FACTOR_MARK = "#lora_"  # between a weight's name and that of its factor: no tensor of a model has it


class LoraFactors(NamedTuple):
    """The change s B A of one weight `[d_out, d_in]`.

    Attributes:
      a: A `[r, d_in]`, as stored.
      b: B `[d_out, r]`.
      scale: s.
      module: as the model's class calls it, and peft, without what wrapped it when it ran.
    """

    a: TensorInfo
    b: TensorInfo
    scale: float
    module: str

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedCheckpoint(Checkpoint):
    """An adapter on its base, as a task: `config` is that of the adapter, `tensors` are all of the base.

    What the adapter leaves is the base's own entry. The entry of an adapted weight has the base's shape and no bytes.

    Attributes:
      base: on which it sits.
      factors: by canonical name of the weight.
    """

    base: Checkpoint
    factors: Mapping[str, LoraFactors]

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """What lies in the adapter's own file: the factors, and tensors in place of the base's."""
        factors = (x for pair in self.factors.values() for x in (pair.a, pair.b))
        return (*factors, *(info for info in self.tensors.values() if info.file in self.weight_files and info.spans))

    def read(self, names: Iterable[str] | None = None) -> dict[str, NumpyArray]:
        """The weights, those with factors as W + s B A in float32."""
        wanted = self.unread(self.tensors if names is None else names)
        return {name: wanted[name] for name in wanted}

    def unread(self, names: Iterable[str], *, stop: threading.Event | None = None) -> "AdaptedTensors":
        """As `read` gives them, each made when it is asked for; and the changes alone."""
        wanted = list(dict.fromkeys(names))
        plain = Checkpoint.unread(self, [name for name in wanted if name not in self.factors], stop=stop)
        return AdaptedTensors(self, wanted, plain, stop)

    def squared_changes(self, *, stop: threading.Event | None = None) -> dict[str, float]:
        """Σ (s B A)² of every weight with factors, from their small Gram matrices; NaN where they are not finite."""
        found = {}
        for name in self.factors:
            left, right = factor_arrays(self.factors[name], stop)
            with np.errstate(over="ignore", invalid="ignore"):
                left, right = left.astype(np.float64), right.astype(np.float64)  # squares of squares leave float32 soon
                # Rounding may leave less than nothing of a change that is nearly none.
                found[name] = max(float(np.sum((left.T @ left) * (right @ right.T))), 0.0)
        return {name: x if math.isfinite(x) else math.nan for name, x in found.items()}


class AdaptedTensors(Mapping[str, Any]):
    """The tensors of an adapted model by canonical name, and what the adapter changes in them."""

    def __init__(self, model: AdaptedCheckpoint, names: list[str], plain: Any, stop: threading.Event | None) -> None:
        self._model, self._names, self._plain, self._stop = model, dict.fromkeys(names), plain, stop

    def __getitem__(self, name: str) -> NumpyArray:
        if name not in self._names or name not in self._model.factors:
            return self._plain[name]
        ours = self._model.base.unread([name], stop=self._stop)[name]
        wide = np.float64 if ours.dtype == np.float64 else np.float32
        left, right = self._factors(name)
        return ours.astype(wide) + (left @ right).astype(wide)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def part(self, name: str, index: int) -> NumpyArray:
        """Matrix number `index` of a stack of them, read alone."""
        return self._plain.part(name, index)

    def is_unchanged(self, name: str) -> bool:
        """Whether a tensor is the base's own."""
        return self._model.tensors[name] is self._model.base.tensors.get(name)

    def change(self, name: str) -> tuple[NumpyArray, NumpyArray] | None:
        """S B and A of a weight, in float32; None of one without factors."""
        return self._factors(name) if name in self._model.factors else None

    def _factors(self, name: str) -> tuple[Float[np.ndarray, "d_out r"], Float[np.ndarray, "r d_in"]]:
        return factor_arrays(self._model.factors[name], self._stop)


def factor_arrays(
    factors: LoraFactors, stop: threading.Event | None = None
) -> tuple[Float[np.ndarray, "d_out r"], Float[np.ndarray, "r d_in"]]:
    """S B and A, in float32."""
    stored = UnreadTensors({"a": factors.a, "b": factors.b}, stop)
    return factors.scale * stored["b"].astype(np.float32), stored["a"].astype(np.float32)


def factor_info(info: TensorInfo, weight: str, factor: str) -> TensorInfo:
    """A stored factor, named after the weight that it is of."""
    return dataclasses.replace(info, name=f"{weight}{_FACTOR_MARK}{factor}")


def weight_of(name: str) -> str:
    """The weight that a stored tensor is of, by the name of its entry."""
    return name.partition(_FACTOR_MARK)[0]
