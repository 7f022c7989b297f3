"""A CLIP vision tower's parameters: from the checkpoint's flat names to the linen tree."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from nufilt_jax.errors import CheckpointError, Problem, raise_all
from nufilt_jax.models.clip_config import ClipTowerConfig, ClipVisionConfig
from nufilt_jax.models.experts import expert_shapes
from nufilt_jax.models.trees import linen_tree, tensor_problems

_PROJECTION = "visual_projection.weight"
_POSITION_IDS = "vision_model.embeddings.position_ids"  # a buffer of old checkpoints: 0, 1, 2, ...
_OTHER_HALF = ("text_model.", "text_projection.", "logit_scale")


def canonical_shapes(config: ClipVisionConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a tower without projection, by canonical name, in the order of the forward pass."""
    width, size = config.hidden_size, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, config.num_channels, size, size),
        "embeddings.position_embedding.weight": (config.num_positions, width),
    }

    shapes |= affine_shapes("pre_layrnorm", width) | encoder_shapes(config) | affine_shapes("post_layernorm", width)
    return {f"vision_model.{name}": shape for name, shape in shapes.items()}


def encoder_shapes(config: ClipTowerConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a tower's blocks, as either tower has them, without the tower's prefix."""
    width, inner = config.hidden_size, config.intermediate_size
    parts = {"layer_norm1": (width,)}
    parts |= {f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    parts |= {"layer_norm2": (width,), "mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    blocks = range(config.num_hidden_layers)
    found = (affine_shapes(f"encoder.layers.{i}.{name}", *shape) for i in blocks for name, shape in parts.items())
    return {name: shape for shapes in found for name, shape in shapes.items()}


def affine_shapes(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """Weight and bias of a norm or a linear layer."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


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
    tower = {name: value for name, value in params.items() if _is_in_tower(name, whole_model)}
    given = {name: np.shape(value) for name, value in tower.items()}
    raise_all(CheckpointError, tower_problems(given, config, whole_model=whole_model))
    return linen_tree(tower, lookups=("position_embedding",), norm_leaf="scale", dtype=jnp.float32)


def tower_problems(
    given: Mapping[str, tuple[int, ...]], config: ClipVisionConfig, *, whole_model: bool = False
) -> list[Problem]:
    """What of a model's tensors, known by their shapes, keeps `to_flax_tree` from making the tree."""
    tower = {name: shape for name, shape in given.items() if _is_in_tower(name, whole_model)}
    expected = canonical_shapes(config)
    if len(tower.get(_PROJECTION, ())) == 2:
        expected[_PROJECTION] = (tower[_PROJECTION][0], config.hidden_size)
    expected |= expert_shapes(tower, expected, config.hidden_size)
    return tensor_problems(tower, expected, "CLIP vision model")


def _is_in_tower(name: str, whole_model: bool) -> bool:
    return name != _POSITION_IDS and not (whole_model and name.startswith(_OTHER_HALF))
