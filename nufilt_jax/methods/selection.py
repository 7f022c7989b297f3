"""Which tensors a rule works on: the selected layers, and what becomes of the other parameters."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from nufilt_jax.config import OtherParams
from nufilt_jax.errors import ConfigError, Problem

# The published choice per model family (spec of the selected layers; arXiv:2509.21413v2, Appendix B): CLIP's vision
# tower without fc2; T5 without head and relative positions; LLaVA's (or a plain Llama's) language model.
DEFAULT_LAYERS = (
    r"vision_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc1)\.weight",
    r"(encoder|decoder)\.block\.\d+\.layer\.\d+\.((Self|EncDec)Attention\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo))\.weight",
    r"(language_model\.)?model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight",
)
CLIP_VISION = "vision_model."


@runtime_checkable
class TensorLike(Protocol):
    """A tensor's shape and dtype: an array, or a file's header entry."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Its element type."""
        ...


class Selection(NamedTuple):
    """Names of the tensors a merge touches; all others stay as the base has them.

    Attributes:
      layers: those that the rule itself works on.
      other: those that follow `--other-params`.
    """

    layers: tuple[str, ...]
    other: tuple[str, ...]

    @property
    def touched(self) -> tuple[str, ...]:
        """Both."""
        return self.layers + self.other


def select(
    base: Mapping[str, TensorLike],
    *,
    layers: str | None = None,
    other_params: OtherParams = "pretrained",
    every_tensor: bool = False,
) -> Selection:
    """Selects from a model.

    On CLIP models all of it stays within the vision tower. Integer buffers are never touched.

    Args:
      base: the model's tensors by canonical name.
      layers: regular expression searched in the names of matrices; None for the published choice.
      other_params: whether the unselected tensors are touched too.
      every_tensor: the rule works on every tensor, not only on selected matrices, unless `layers` narrows it.

    Raises:
      ConfigError: a broken expression, or one that selects nothing.
    """
    in_scope = [name for name in _scope(base) if is_float(base[name].dtype)]
    if layers is None and every_tensor:
        return Selection(tuple(in_scope), ())
    wanted = _matcher(layers)
    chosen = tuple(name for name in in_scope if len(base[name].shape) == 2 and wanted(name))
    if not chosen:
        what = (
            "no matrix of this model is among the known layers" if layers is None else f"no matrix matches {layers!r}"
        )
        raise ConfigError(Problem("--layers", what, f"the names look like {_example(base)}"))
    rest = () if other_params == "pretrained" else tuple(sorted(set(in_scope) - set(chosen)))
    return Selection(chosen, rest)


def is_float(dtype: np.dtype) -> bool:
    """Whether tensors of this type can be merged: float16, bfloat16, float32 or float64."""
    return jnp.dtype(dtype) in (jnp.float16, jnp.dtype(ml_dtypes.bfloat16), jnp.float32, jnp.dtype("float64"))


def _scope(names: Iterable[str]) -> list[str]:
    names = sorted(names)
    return [name for name in names if name.startswith(CLIP_VISION)] or names


def _matcher(layers: str | None) -> Callable[[str], object]:
    if layers is None:
        known = [re.compile(pattern) for pattern in DEFAULT_LAYERS]
        return lambda name: any(pattern.fullmatch(name) for pattern in known)
    try:
        return re.compile(layers).search
    except re.error as error:
        raise ConfigError(Problem("--layers", f"{layers!r} is no regular expression: {error}")) from error


def _example(base: Mapping[str, TensorLike]) -> str:
    matrices = [name for name in _scope(base) if len(base[name].shape) == 2]
    return matrices[len(matrices) // 2] if matrices else "nothing: it has no matrices"
