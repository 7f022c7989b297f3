"""A CLIP vision tower's parameters: from the checkpoint's flat names to the linen tree, and back."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from nufilt_jax.errors import CheckpointError, raise_all
from nufilt_jax.models.clip_config import ClipVisionConfig
from nufilt_jax.models.experts import expert_shapes
from nufilt_jax.models.trees import tensor_problems

_PROJECTION = "visual_projection.weight"
_POSITION_IDS = "vision_model.embeddings.position_ids"  # a buffer of old checkpoints: 0, 1, 2, ...
_OTHER_HALF = ("text_model.", "text_projection.", "logit_scale")


def canonical_shapes(config: ClipVisionConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a tower without projection, by canonical name, in the order of the forward pass."""
    width, inner, size = config.hidden_size, config.intermediate_size, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, config.num_channels, size, size),
        "embeddings.position_embedding.weight": (config.num_positions, width),
    }

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    add("pre_layrnorm", width)
    for index in range(config.num_hidden_layers):
        layer = f"encoder.layers.{index}"
        add(f"{layer}.layer_norm1", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            add(f"{layer}.self_attn.{name}", width, width)
        add(f"{layer}.layer_norm2", width)
        add(f"{layer}.mlp.fc1", inner, width)
        add(f"{layer}.mlp.fc2", width, inner)
    add("post_layernorm", width)
    return {f"vision_model.{name}": shape for name, shape in shapes.items()}


def to_flax_tree(
    params: Mapping[str, ArrayLike], config: ClipVisionConfig, *, whole_model: bool = False
) -> dict[str, Any]:
    """The linen tree of `ClipVisionModule`, in float32.

    Args:
      params: flat dict under canonical names, weights `[d_out, d_in]`, the patch kernel `[d_out, c, kh, kw]`.
      config: the tower's shape.
      whole_model: whether `params` are a whole CLIP model's: then the text half is left aside, else refused.

    Returns:
      Nested dict; kernels `[d_in, d_out]`, the patch kernel `[kh, kw, c, d_out]`, experts as they are.

    Raises:
      CheckpointError: tensors are missing, unknown or of another shape; all of them are listed.
    """
    tower = {
        name: value
        for name, value in params.items()
        if name != _POSITION_IDS and not (whole_model and name.startswith(_OTHER_HALF))
    }
    expected = canonical_shapes(config)
    given = {name: np.shape(value) for name, value in tower.items()}
    if len(given.get(_PROJECTION, ())) == 2:
        expected[_PROJECTION] = (given[_PROJECTION][0], config.hidden_size)
    expected |= expert_shapes(given, expected, config.hidden_size)
    raise_all(CheckpointError, tensor_problems(tower, expected, "CLIP vision model"))
    flat = {_flax_path(name, np.ndim(value)): _flax_value(name, value) for name, value in tower.items()}
    return traverse_util.unflatten_dict(flat)


def _flax_path(name: str, n_axes: int) -> tuple[str, ...]:
    *parents, leaf = name.split(".")
    if leaf != "weight":
        return (*parents, leaf)
    if parents[-1] == "position_embedding":
        return (*parents, "embedding")
    return (*parents, "scale" if n_axes == 1 else "kernel")


def _flax_value(name: str, value: ArrayLike) -> Float[Array, "..."]:
    array = jnp.asarray(value).astype(jnp.float32)
    if array.ndim == 4:
        return jnp.transpose(array, (2, 3, 1, 0))
    is_kernel = array.ndim == 2 and name.endswith(".weight") and not name.endswith("position_embedding.weight")
    return jax.lax.transpose(array, (1, 0)) if is_kernel else array
