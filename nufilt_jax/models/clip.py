"""CLIP's vision tower in Flax linen, with the parameter tree of Hugging Face's Flax classes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

from nufilt_jax.errors import CheckpointError, Problem
from nufilt_jax.models.clip_config import ClipTowerConfig, ClipVisionConfig, parse_vision_config
from nufilt_jax.models.clip_names import to_flax_tree
from nufilt_jax.models.experts import gate_weights, mixed_dense

_HIGHEST = jax.lax.Precision.HIGHEST


def clip_image_features(
    params: Mapping[str, ArrayLike], pixel_values: Float[Array, "b c h w"], config: Mapping[str, Any]
) -> Float[Array, "b d"]:
    """Image features of a CLIP model, in float32.

    Pure in `params` and `pixel_values`, so it can be jitted and differentiated, and `vmap` over a leading
    axis of `params` runs several models of one shape in one program. `config` must not be traced.

    Args:
      params: the flat dict of a checkpoint, under the canonical (PyTorch) names, weights `[d_out, d_in]`.
        Of a whole CLIP model, the text tower's tensors are left aside. If they hold gates and experts, the features
        of an image depend on the whole batch, see `models.experts`.
      pixel_values: normalised images; `h` and `w` are the config's `image_size`.
      config: `config.json` of a CLIP vision model, or of a whole CLIP model.

    Returns:
      The class token after the last layer norm; if `params` hold `visual_projection.weight`, its projection.

    Raises:
      CheckpointError: the config is not of a CLIP model, a tensor is missing, unknown or of another shape, or
        the images are not of the config's size.
    """
    vision = parse_vision_config(config)
    tree = to_flax_tree(params, vision, whole_model=config.get("model_type") == "clip")
    return vision_features(tree, pixel_values, vision)


def vision_features(
    tree: Mapping[str, Any],
    pixel_values: Float[Array, "b c h w"],
    config: ClipVisionConfig,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b d"]:
    """The same from a linen tree, as `to_flax_tree` makes it: the pooled or the projected features.

    In another `dtype` than float32, layer norms, softmax and what mixes experts still compute in float32.
    """
    side = config.image_size
    wanted = (config.num_channels, side, side)
    if pixel_values.shape[1:] != wanted:
        what = f"images are {pixel_values.shape[1:]}, config.json describes {wanted}"
        raise CheckpointError(Problem("pixel_values", what, "resize them as the preprocessor does"))
    projection = tree.get("visual_projection")
    projection_dim = None if projection is None else projection["kernel"].shape[1]
    module = ClipVisionModule(config, projection_dim)
    features = module.apply({"params": tree}, pixel_values.astype(dtype))
    assert isinstance(features, jax.Array)  # for the type checker: apply may also return variables
    return features.astype(jnp.float32)


def layer_norm(hidden: Float[Array, "*b d"], eps: float, name: str) -> Float[Array, "*b d"]:
    """Layer norm of both towers, computed in float32."""
    # Not E[x²] − E[x]²: that loses digits where the mean is large, as in CLIP's few outlier channels.
    norm = nn.LayerNorm(eps, use_fast_variance=False, name=name)
    return norm(hidden.astype(jnp.float32)).astype(hidden.dtype)


def linear(inputs: Float[Array, "*b n"], n_outputs: int, name: str, *, use_bias: bool = True) -> Float[Array, "*b m"]:
    """A linear layer of either tower, computed in the inputs' dtype."""
    layer = nn.Dense(n_outputs, use_bias=use_bias, dtype=inputs.dtype, precision=_HIGHEST, name=name)
    return layer(inputs)


class ClipVisionModule(nn.Module):
    """Tower and, if `projection_dim` is given, the projection into the space shared with text.

    It computes in the dtype of the pixels.
    """

    config: ClipVisionConfig
    projection_dim: int | None = None

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "b c h w"]) -> Float[Array, "b d"]:
        """Pooled, or projected, features."""
        pooled = _Transformer(self.config, name="vision_model")(pixel_values)
        if self.projection_dim is None:
            return pooled
        return linear(pooled, self.projection_dim, "visual_projection", use_bias=False)


class _Transformer(nn.Module):
    config: ClipVisionConfig

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "b c h w"]) -> Float[Array, "b d"]:
        hidden = _Embeddings(self.config, name="embeddings")(pixel_values)
        # The misspelt name is the checkpoints' own.
        hidden = layer_norm(hidden, self.config.layer_norm_eps, "pre_layrnorm")
        hidden = ClipEncoder(self.config, name="encoder")(hidden)
        return layer_norm(hidden[:, 0], self.config.layer_norm_eps, "post_layernorm")


class _Embeddings(nn.Module):
    config: ClipVisionConfig

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "b c h w"]) -> Float[Array, "b tokens d"]:
        config = self.config
        patches = _PatchEmbedding(config, name="patch_embedding")(pixel_values)
        first = self.param("class_embedding", nn.initializers.normal(0.02), (config.hidden_size,)).astype(patches.dtype)
        first = jnp.broadcast_to(first, (patches.shape[0], 1, config.hidden_size))
        tokens = jnp.concatenate([first, patches], axis=1)
        place = nn.Embed(config.num_positions, config.hidden_size, dtype=tokens.dtype, name="position_embedding")
        return tokens + place(jnp.arange(config.num_positions))[None]


class _PatchEmbedding(nn.Module):
    """A convolution whose stride is its size, written as the matrix product that it is.

    A convolution under `vmap` over models becomes a grouped one, which XLA runs slowly on CPU.
    """

    config: ClipVisionConfig

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "b c h w"]) -> Float[Array, "b patches d"]:
        size, channels = self.config.patch_size, self.config.num_channels
        n_side = self.config.image_size // size
        shape = (size, size, channels, self.config.hidden_size)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(pixel_values.dtype)
        whole = pixel_values[:, :, : n_side * size, : n_side * size]  # the rest is dropped, as by padding "VALID"
        tiles = whole.reshape(-1, channels, n_side, size, n_side, size)
        tokens = jnp.einsum("bcyixj,ijcd->byxd", tiles, kernel, precision=_HIGHEST)
        return tokens.reshape(-1, n_side * n_side, self.config.hidden_size)


class ClipEncoder(nn.Module):
    """The layers of either tower; `visible` says which tokens each token may see, all of them if it is left out."""

    config: ClipTowerConfig

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "b tokens d"], visible: Bool[Array, "b tokens tokens"] | None = None
    ) -> Float[Array, "b tokens d"]:
        """States after the last layer."""
        return _LayerCollection(self.config, name="layers")(hidden, visible)


class _LayerCollection(nn.Module):
    config: ClipTowerConfig

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "b tokens d"], visible: Bool[Array, "b tokens tokens"] | None
    ) -> Float[Array, "b tokens d"]:
        for index in range(self.config.num_hidden_layers):
            hidden = _Layer(self.config, name=str(index))(hidden, visible)
        return hidden


class _Layer(nn.Module):
    config: ClipTowerConfig

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "b tokens d"], visible: Bool[Array, "b tokens tokens"] | None
    ) -> Float[Array, "b tokens d"]:
        eps = self.config.layer_norm_eps
        normed = layer_norm(hidden, eps, "layer_norm1")
        hidden = hidden + _Attention(self.config, name="self_attn")(normed, visible)
        normed = layer_norm(hidden, eps, "layer_norm2")
        return hidden + _Mlp(self.config, name="mlp")(normed)


class _Attention(nn.Module):
    config: ClipTowerConfig

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "b tokens d"], visible: Bool[Array, "b tokens tokens"] | None
    ) -> Float[Array, "b tokens d"]:
        n_batch, n_tokens, width = hidden.shape
        n_heads = self.config.num_attention_heads

        def project(name: str) -> Float[Array, "b tokens heads e"]:
            return linear(hidden, width, name).reshape(n_batch, n_tokens, n_heads, width // n_heads)

        query, key, value = project("q_proj"), project("k_proj"), project("v_proj")
        scores = jnp.einsum("bqhe,bkhe->bhqk", query, key, precision=_HIGHEST) * (width // n_heads) ** -0.5
        if visible is not None:
            # Finite: a token that sees nothing, as padding on the left, must not become NaN.
            scores = jnp.where(visible[:, None], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(scores.dtype)
        mixed = jnp.einsum("bhqk,bkhe->bqhe", weights, value, precision=_HIGHEST)
        return linear(mixed.reshape(hidden.shape), width, "out_proj")


class _Mlp(nn.Module):
    config: ClipTowerConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "b tokens d"]) -> Float[Array, "b tokens d"]:
        if self.has_variable("params", "gate"):
            return self._mixed(hidden.astype(jnp.float32)).astype(hidden.dtype)
        inner = linear(hidden, self.config.intermediate_size, "fc1")
        return linear(self._activate(inner), self.config.hidden_size, "fc2")

    def _mixed(self, hidden: Float[Array, "b tokens d"]) -> Float[Array, "b tokens d"]:
        gate, first, last = (self.get_variable("params", name) for name in ("gate", "fc1", "fc2"))
        weights = gate_weights(gate, hidden)
        return mixed_dense(last, weights, self._activate(mixed_dense(first, weights, hidden)))

    def _activate(self, inner: Float[Array, "b tokens i"]) -> Float[Array, "b tokens i"]:
        if self.config.hidden_act == "quick_gelu":
            return inner * jax.nn.sigmoid(1.702 * inner)
        return jax.nn.gelu(inner, approximate=False)
