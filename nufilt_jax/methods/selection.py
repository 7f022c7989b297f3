"""Which tensors a rule works on: the selected layers, and what becomes of the other parameters."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from nufilt_jax import anatomy
from nufilt_jax.anatomy import ModelFamily
from nufilt_jax.config import OtherParams
from nufilt_jax.errors import ConfigError, Problem
from nufilt_jax.patterns import expression, patterns

CLIP_VISION = "vision_model."
T5_EMBEDDING = "shared.weight"  # one tensor, which a T5 knows under three names

# Which of a model's tensors a rule works on, by name, shape, and the model's family.
Scope = Callable[[str, tuple[int, ...], ModelFamily], bool]


def published_layers(name: str, shape: tuple[int, ...], family: ModelFamily = "other") -> bool:
    """The layers that NUFILT merges: the paper's for its models, all linear layers of the blocks of any other.

    The paper's are CLIP's attention and first feed-forward matrices, all of T5's blocks, and those of LLaVA's language
    model (Appendix B of arXiv:2509.21413v2).
    """
    if family == "clip" and not re.fullmatch(r".+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc1)\.weight", name):
        return False
    if family == "llava" and not name.startswith("language_model."):
        return False
    return anatomy.is_linear(name, shape)


def is_linear_layer(name: str, shape: tuple[int, ...], family: ModelFamily = "other") -> bool:
    """Weights of linear layers: matrices that are no embeddings."""
    # What is looked up multiplies no input: the authors' programs go by the kind of module here.
    return (len(shape) == 2 or anatomy.is_experts(name, shape)) and not anatomy.is_lookup(name)


def every_tensor(name: str, shape: tuple[int, ...], family: ModelFamily = "other") -> bool:
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
    """What a merge touches; all other tensors stay as the base has them.

    Attributes:
      layers: those that the rule itself works on, by name; see `anatomy.layers_in`.
      other: tensors that follow `--other-params`.
    """

    layers: tuple[str, ...]
    other: tuple[str, ...]

    @property
    def touched(self) -> tuple[str, ...]:
        """Names of all tensors touched, each once."""
        return tuple(dict.fromkeys(map(anatomy.tensor_of, self.layers + self.other)))


def select(
    base: Mapping[str, TensorLike],
    *,
    layers: str | None = None,
    other_params: OtherParams = "pretrained",
    scope: Scope = published_layers,
    conv: bool = False,
) -> Selection:
    """Selects from a model.

    On CLIP models all of it stays within the vision tower, unless an expression names what is outside. Integer and
    computed buffers and empty tensors are never touched.

    Args:
      base: the model's tensors by canonical name.
      layers: regular expression searched in the names of matrices; None for the rule's own choice.
      other_params: whether the unselected tensors are touched too.
      scope: the rule's own choice.
      conv: whether convolutions of blocks are matrices too, laid flat.

    Raises:
      ConfigError: a broken expression, or one that selects nothing.
    """
    can_reach = reach_of(base, layers)
    # Sorted: the order in which files hold their tensors never matters.
    reach = [name for name in sorted(base) if can_reach(name) and is_mergeable(name, base[name])]
    wanted = wanted_by(base, layers=layers, scope=scope, conv=conv)
    chosen = [name for name in reach if wanted(name, base[name].shape)]
    if not chosen:
        raise ConfigError(
            _nothing_selected(base, reach, layers, wanted_by(base, layers=layers, scope=scope, conv=True))
        )
    rest = () if other_params == "pretrained" else tuple(sorted(set(reach) - set(chosen)))
    split = (anatomy.layers_in(name, base[name].shape, flat=conv) for name in chosen)
    return Selection(tuple(layer for parts in split for layer in parts), rest)


def wanted_by(
    names: Iterable[str], *, layers: str | None, scope: Scope, conv: bool = False
) -> Callable[[str, tuple[int, ...]], bool]:
    """The choice itself, whatever a tensor's element type: a function of a name and a shape.

    Raises:
      ConfigError: a broken expression.
    """
    family = anatomy.family_of(names)

    if layers is not None:
        pattern = _compiled(layers)

        def matches(name: str, shape: tuple[int, ...]) -> bool:
            flat = conv and anatomy.is_convolution(name, shape)
            is_matrix = len(shape) == 2 or flat or anatomy.is_experts(name, shape)
            return is_matrix and pattern.search(name) is not None

        return matches
    flat = conv and scope in (published_layers, is_linear_layer)
    return lambda name, shape: scope(name, shape, family) or (flat and anatomy.is_convolution(name, shape))


def is_mergeable(name: str, tensor: TensorLike) -> bool:
    """Whether a tensor's numbers were trained and can be merged."""
    return is_float(tensor.dtype) and 0 not in tensor.shape and not anatomy.is_buffer(name, tensor.shape)


def n_copies(name: str, embedding_copies: int) -> int:
    """How often a tensor counts: once, or so many times if it is a T5's token embedding."""
    return embedding_copies if name == T5_EMBEDDING else 1


def is_float(dtype: np.dtype) -> bool:
    """Whether tensors of this type can be merged: float16, bfloat16, float32 or float64."""
    return jnp.dtype(dtype).name in ("float16", "bfloat16", "float32", "float64")  # in any order of bytes


def reach_of(names: Iterable[str], layers: str | None) -> Callable[[str], bool]:
    """Which tensors a selection may look at: of a CLIP its vision tower, unless `layers` names what is outside.

    Raises:
      ConfigError: a broken expression.
    """
    names = tuple(names)
    if anatomy.family_of(names) != "clip" or (layers is not None and _names_outside(names, _compiled(layers))):
        return lambda name: True
    return lambda name: name.startswith(CLIP_VISION)


def _names_outside(names: Iterable[str], pattern: re.Pattern[str]) -> bool:
    """Whether an expression finds a tensor outside the vision tower by the module that it is in, or finds none inside.

    `text_model` and `(vision|text)_model.*q_proj` do so, and `q_proj`, which finds as much under any other module,
    does not.
    """
    found = [name for name in names if pattern.search(name)]
    outside = [name for name in found if not name.startswith(CLIP_VISION)]
    # Under a module that is called otherwise, `_`, an expression that needs the module's name finds nothing.
    by_module = (not pattern.search("_" + name[len(name.partition(".")[0]) :]) for name in outside)
    return bool(outside) and (len(outside) == len(found) or any(by_module))


def _compiled(layers: str) -> re.Pattern[str]:
    try:
        return re.compile(layers)
    except re.error as error:
        raise ConfigError(Problem("--layers", f"{layers!r} is no regular expression: {error}")) from error


def _nothing_selected(
    base: Mapping[str, TensorLike],
    reach: list[str],
    layers: str | None,
    wanted_flat: Callable[[str, tuple[int, ...]], bool],
) -> Problem:
    """Says what there is instead, and gives an expression to paste where one can be derived."""
    matrices = [name for name in reach if len(base[name].shape) == 2 and not anatomy.is_lookup(name)]
    if layers is not None:
        what = f"no matrix matches {layers!r}"
    elif any(anatomy.is_linear(name, base[name].shape) for name in matrices):
        what = "this model has none of the tensors that the method chooses by itself"
    else:
        what = "no matrix of this model is in a numbered block"
    if kernels := patterns(name for name in reach if wanted_flat(name, base[name].shape)):
        shown = ", ".join(f"{group.pattern} ({len(group.names)})" for group in kernels[:6])
        more = f" and {len(kernels) - 6} more" if len(kernels) > 6 else ""
        return Problem("--layers", what, f"its kernels of convolutions are {shown}{more}; to merge these: --conv")
    if not matrices:
        return Problem("--layers", what, "the model has no matrices but lookup tables")
    groups = patterns(matrices)
    listed = ", ".join(f"{group.pattern} ({len(group.names)})" for group in groups[:6])
    more = f" and {len(groups) - 6} more" if len(groups) > 6 else ""
    return Problem(
        "--layers", what, f"its matrices are {listed}{more}; to merge these: --layers '{expression(groups)}'"
    )
