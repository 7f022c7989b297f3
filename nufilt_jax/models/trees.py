"""From a checkpoint's flat names to a linen tree: what every model does alike."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import ArrayLike, DTypeLike

from nufilt_jax.errors import Problem
from nufilt_jax.values import native


def tensor_problems(
    given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> list[Problem]:
    """Every tensor that is missing, unknown or of another shape than `expected`; `where` names the model."""
    found = [Problem(where, "missing", tensor=name) for name in expected if name not in given]
    for name, shape in given.items():
        if name not in expected:
            found.append(Problem(where, "no such tensor in the model that config.json describes", tensor=name))
        elif shape != expected[name]:
            what = f"shape is {shape}, config.json describes {expected[name]}"
            found.append(Problem(where, what, tensor=name))
    return found


def linen_tree(
    params: Mapping[str, ArrayLike], *, lookups: Collection[str], norm_leaf: str, dtype: DTypeLike
) -> dict[str, Any]:
    """Nested dict under HF Flax's names, in `dtype`; kernels are `[d_in, d_out]`, or `[kh, kw, c, d_out]`.

    Args:
      params: checked tensors under canonical names: vectors, matrices, and kernels of convolutions.
      lookups: modules whose matrix is looked up and not multiplied with; they keep its orientation.
      norm_leaf: what the model's Flax class calls the weight of a norm.
      dtype: of every leaf.
    """
    flat: dict[tuple[str, ...], jax.Array] = {}
    for name, value in params.items():
        *parents, leaf = name.split(".")
        array = jnp.asarray(native(value)).astype(dtype)
        if leaf != "weight":
            flat[*parents, leaf] = array
        elif array.ndim == 1:
            flat[*parents, norm_leaf] = array
        elif parents[-1] in lookups:
            flat[*parents, "embedding"] = array
        else:
            axes = (1, 0) if array.ndim == 2 else (2, 3, 1, 0)
            flat[*parents, "kernel"] = jax.lax.transpose(array, axes)
    return traverse_util.unflatten_dict(flat)
