"""A T5's parameters: from the checkpoint's flat names to the linen tree."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from nufilt_jax.errors import CheckpointError, ConfigError, Problem, raise_all
from nufilt_jax.models.experts import expert_shapes
from nufilt_jax.models.t5_config import T5Config
from nufilt_jax.models.trees import linen_tree, tensor_problems

_HEAD = "lm_head.weight"
# Stored in the first checkpoints of T5, and used by no release of transformers: cross-attention knows no positions.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_LOOKUPS = ("shared", "relative_attention_bias")


def t5_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that a T5 must have, by canonical name, in the order of the forward pass."""
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (config.vocab_size, config.d_model)}
    width, inner = config.d_model, config.num_heads * config.d_kv
    feed_forward = ("wi_0", "wi_1") if config.is_gated else ("wi",)
    for stack, n_blocks in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        attentions = ("SelfAttention", "EncDecAttention") if stack == "decoder" else ("SelfAttention",)
        for block in range(n_blocks):
            layers = f"{stack}.block.{block}.layer"
            for index, attention in enumerate(attentions):
                for name in ("q", "k", "v"):
                    shapes[f"{layers}.{index}.{attention}.{name}.weight"] = (inner, width)
                shapes[f"{layers}.{index}.{attention}.o.weight"] = (width, inner)
                if block == index == 0:
                    table = (config.relative_attention_num_buckets, config.num_heads)
                    shapes[f"{layers}.0.{attention}.relative_attention_bias.weight"] = table
                shapes[f"{layers}.{index}.layer_norm.weight"] = (width,)
            last = f"{layers}.{len(attentions)}"
            for name in feed_forward:
                shapes[f"{last}.DenseReluDense.{name}.weight"] = (config.d_ff, width)
            shapes[f"{last}.DenseReluDense.wo.weight"] = (width, config.d_ff)
            shapes[f"{last}.layer_norm.weight"] = (width,)
        shapes[f"{stack}.final_layer_norm.weight"] = (width,)
    if config.has_head:
        shapes[_HEAD] = (config.vocab_size, width)
    return shapes


def to_t5_tree(params: Mapping[str, ArrayLike], config: T5Config, *, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """The linen tree of `T5Module`.

    Args:
      params: flat dict under canonical names, weights `[d_out, d_in]`, the embedding once as `shared.weight`.
        With an `lm_head.weight` that is the head, else the embedding is. Gates and experts may be added, see
        `models.experts`.
      config: the model's shape.
      dtype: float32 or bfloat16, in which the model then computes.

    Raises:
      CheckpointError: tensors are missing, unknown or of another shape; all of them are listed.
      ConfigError: `dtype` is another.
    """
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        what = f"{jnp.dtype(dtype).name} is not float32 or bfloat16"
        raise ConfigError(Problem("dtype", what, "T5's activations leave float16's range"))
    model = {name: value for name, value in params.items() if name != _UNUSED}
    raise_all(CheckpointError, t5_problems({name: np.shape(value) for name, value in model.items()}, config))
    return linen_tree(model, lookups=_LOOKUPS, norm_leaf="weight", dtype=dtype)


def t5_problems(given: Mapping[str, tuple[int, ...]], config: T5Config) -> list[Problem]:
    """What of a model's tensors, known by their shapes, keeps `to_t5_tree` from making the tree."""
    model = {name: shape for name, shape in given.items() if name != _UNUSED}
    expected = t5_shapes(config)
    if _HEAD in model:
        expected[_HEAD] = (config.vocab_size, config.d_model)
    expected |= expert_shapes(model, expected, config.d_model)
    return tensor_problems(model, expected, "T5 model")
