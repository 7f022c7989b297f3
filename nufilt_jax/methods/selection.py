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
T5_EMBEDDING = "shared.weight"  # one tensor, which a T5 knows under three names

# Matrices that are looked up and not multiplied with: embeddings, and T5's tables of relative positions.
_LOOKUP = re.compile(
    r"(.*\.)?(shared|embed_tokens|wte|wpe|relative_attention_bias|[a-z_]*(embedding|embeddings|embed))\.weight"
)

# Which of a model's tensors a rule works on, by name and shape.
Scope = Callable[[str, tuple[int, ...]], bool]


def published_layers(name: str, shape: tuple[int, ...]) -> bool:
    """The layers that the paper merges by NUFILT, see `DEFAULT_LAYERS`."""
    return len(shape) == 2 and any(re.fullmatch(pattern, name) for pattern in DEFAULT_LAYERS)


def linear_layers(name: str, shape: tuple[int, ...]) -> bool:
    """Weights of linear layers: matrices that are no embeddings."""
    return len(shape) == 2 and not _LOOKUP.fullmatch(name)


def every_tensor(name: str, shape: tuple[int, ...]) -> bool:
    """All."""
    return True


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
    scope: Scope = published_layers,
) -> Selection:
    """Selects from a model.

    On CLIP models all of it stays within the vision tower. Integer buffers are never touched.

    Args:
      base: the model's tensors by canonical name.
      layers: regular expression searched in the names of matrices; None for the rule's own choice.
      other_params: whether the unselected tensors are touched too.
      scope: the rule's own choice.

    Raises:
      ConfigError: a broken expression, or one that selects nothing.
    """
    in_scope = [name for name in _scope(base) if is_float(base[name].dtype)]
    wanted = scope if layers is None else _matrices(layers)
    chosen = tuple(name for name in in_scope if wanted(name, base[name].shape))
    if not chosen:
        what = (
            "no matrix of this model is among the known layers" if layers is None else f"no matrix matches {layers!r}"
        )
        raise ConfigError(Problem("--layers", what, f"the names look like {_example(base)}"))
    rest = () if other_params == "pretrained" else tuple(sorted(set(in_scope) - set(chosen)))
    return Selection(chosen, rest)


def n_copies(name: str, embedding_copies: int) -> int:
    """How often a tensor counts: once, or so many times if it is a T5's token embedding."""
    return embedding_copies if name == T5_EMBEDDING else 1


def is_float(dtype: np.dtype) -> bool:
    """Whether tensors of this type can be merged: float16, bfloat16, float32 or float64."""
    return jnp.dtype(dtype) in (jnp.float16, jnp.dtype(ml_dtypes.bfloat16), jnp.float32, jnp.dtype("float64"))


def _scope(names: Iterable[str]) -> list[str]:
    names = sorted(names)
    return [name for name in names if name.startswith(CLIP_VISION)] or names


def _matrices(layers: str) -> Scope:
    try:
        pattern = re.compile(layers)
    except re.error as error:
        raise ConfigError(Problem("--layers", f"{layers!r} is no regular expression: {error}")) from error
    return lambda name, shape: len(shape) == 2 and pattern.search(name) is not None


def _example(base: Mapping[str, TensorLike]) -> str:
    matrices = [name for name in _scope(base) if len(base[name].shape) == 2]
    return matrices[len(matrices) // 2] if matrices else "nothing: it has no matrices"
