"""CLIP's text tower in Flax linen, with the parameter tree of Hugging Face's Flax classes."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from nufilt_jax.errors import CheckpointError, Problem
from nufilt_jax.models.clip import ClipEncoder, layer_norm, linear
from nufilt_jax.models.clip_config import ClipTextConfig, parse_text_config
from nufilt_jax.models.clip_text_names import to_text_tree


def clip_text_features(
    params: Mapping[str, ArrayLike],
    input_ids: Int[Array, "b t"],
    attention_mask: Int[Array, "_ _"] | Bool[Array, "_ _"],
    config: Mapping[str, Any],
) -> Float[Array, "b d"]:
    """Text features of a CLIP model, in float32.

    Pure in the arrays, as `clip_image_features` is. `config` must not be traced.

    Args:
      params: the flat dict of a checkpoint, under the canonical (PyTorch) names, weights `[d_out, d_in]`.
        Of a whole CLIP model, the vision tower's tensors are left aside.
      input_ids: tokens, at most `max_position_embeddings`, with the end token in every text.
      attention_mask: zero at padding.
      config: `config.json` of a CLIP text model, or of a whole CLIP model.

    Returns:
      The state of the first end token after the last layer norm (of the first token, where there is none); if
      `params` hold `text_projection.weight`, its projection.

    Raises:
      CheckpointError: the config is not of a CLIP model, a tensor is missing, unknown or of another shape, or
        the texts are too long for it.
    """
    text = parse_text_config(config)
    tree = to_text_tree(params, text, whole_model=config.get("model_type") == "clip")
    return text_features(tree, input_ids, attention_mask, text)


@functools.partial(jax.jit, static_argnames="config")
def text_features(
    tree: Mapping[str, Any],
    input_ids: Int[Array, "b t"],
    attention_mask: Int[Array, "_ _"] | Bool[Array, "_ _"],
    config: ClipTextConfig,
) -> Float[Array, "b d"]:
    """The same from a linen tree, as `to_text_tree` makes it: the pooled or the projected features."""
    if input_ids.shape[1] > config.max_position_embeddings:
        what = f"texts of {input_ids.shape[1]} tokens, config.json allows {config.max_position_embeddings}"
        raise CheckpointError(Problem("input_ids", what, "truncate them as the tokenizer does"))
    if attention_mask.shape != input_ids.shape:
        what = f"shape is {attention_mask.shape}, that of input_ids is {input_ids.shape}"
        raise CheckpointError(Problem("attention_mask", what))
    projection = tree.get("text_projection")
    module = ClipTextModule(config, None if projection is None else projection["kernel"].shape[1])
    features = module.apply({"params": tree}, input_ids, attention_mask)
    assert isinstance(features, jax.Array)  # for the type checker: apply may also return variables
    return features


class ClipTextModule(nn.Module):
    """Tower and, if `projection_dim` is given, the projection into the space shared with images."""

    config: ClipTextConfig
    projection_dim: int | None = None

    @nn.compact
    def __call__(
        self, input_ids: Int[Array, "b t"], attention_mask: Int[Array, "b t"] | Bool[Array, "b t"]
    ) -> Float[Array, "b d"]:
        """Pooled, or projected, features."""
        pooled = _Transformer(self.config, name="text_model")(input_ids, attention_mask)
        if self.projection_dim is None:
            return pooled
        return linear(pooled, self.projection_dim, "text_projection", use_bias=False)


class _Transformer(nn.Module):
    config: ClipTextConfig

    @nn.compact
    def __call__(
        self, input_ids: Int[Array, "b t"], attention_mask: Int[Array, "b t"] | Bool[Array, "b t"]
    ) -> Float[Array, "b d"]:
        n_tokens = input_ids.shape[1]
        causal = jnp.tril(jnp.ones((n_tokens, n_tokens), bool))
        visible = causal[None] & attention_mask.astype(bool)[:, None]
        hidden = _Embeddings(self.config, name="embeddings")(input_ids)
        hidden = ClipEncoder(self.config, name="encoder")(hidden, visible)
        hidden = layer_norm(hidden, self.config.layer_norm_eps, "final_layer_norm")
        return jax.vmap(lambda states, end: states[end])(hidden, self._end(input_ids))

    def _end(self, input_ids: Int[Array, "b t"]) -> Int[Array, " b"]:
        # Configs that say 2 are wrong; transformers takes the highest token there, OpenAI's own end token.
        if self.config.eos_token_id == 2:
            return jnp.argmax(input_ids, axis=1)
        return jnp.argmax(input_ids == self.config.eos_token_id, axis=1)


class _Embeddings(nn.Module):
    config: ClipTextConfig

    @nn.compact
    def __call__(self, input_ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        config = self.config
        token = nn.Embed(config.vocab_size, config.hidden_size, name="token_embedding")
        place = nn.Embed(config.max_position_embeddings, config.hidden_size, name="position_embedding")
        return token(input_ids) + place(jnp.arange(input_ids.shape[1]))[None]
