"""A CLIP text tower's parameters: from the checkpoint's flat names to the linen tree."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from nufilt_jax.errors import CheckpointError, raise_all
from nufilt_jax.models.clip_config import ClipTextConfig
from nufilt_jax.models.clip_names import affine_shapes, encoder_shapes
from nufilt_jax.models.trees import linen_tree, tensor_problems

_PROJECTION = "text_projection.weight"
_POSITION_IDS = "text_model.embeddings.position_ids"  # a buffer of old checkpoints: 0, 1, 2, ...
_OTHER_HALF = ("vision_model.", "visual_projection.", "logit_scale")


def text_shapes(config: ClipTextConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a text tower without projection, by canonical name, in the order of the forward pass."""
    width = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (config.vocab_size, width),
        "embeddings.position_embedding.weight": (config.max_position_embeddings, width),
    }

    shapes |= encoder_shapes(config) | affine_shapes("final_layer_norm", width)
    return {f"text_model.{name}": shape for name, shape in shapes.items()}


def to_text_tree(
    params: Mapping[str, ArrayLike], config: ClipTextConfig, *, whole_model: bool = False
) -> dict[str, Any]:
    """The linen tree of `ClipTextModule`, in float32.

    Args:
      params: flat dict under canonical names, weights `[d_out, d_in]`.
      config: the tower's shape.
      whole_model: whether `params` are a whole CLIP model's: then the vision half is left aside, else refused.

    Raises:
      CheckpointError: tensors are missing, unknown or of another shape; all of them are listed.
    """
    tower = {
        name: value
        for name, value in params.items()
        if name != _POSITION_IDS and not (whole_model and name.startswith(_OTHER_HALF))
    }
    expected = text_shapes(config)
    given = {name: np.shape(value) for name, value in tower.items()}
    if len(given.get(_PROJECTION, ())) == 2:
        expected[_PROJECTION] = (given[_PROJECTION][0], config.hidden_size)
    raise_all(CheckpointError, tensor_problems(given, expected, "CLIP text model"))
    lookups = ("token_embedding", "position_embedding")
    return linen_tree(tower, lookups=lookups, norm_leaf="scale", dtype=jnp.float32)
