"""T5's encoder-decoder in Flax linen, with the parameter tree of Hugging Face's Flax class."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nufilt_jax.errors import CheckpointError, ConfigError, Problem
from nufilt_jax.models.t5_config import T5Config, parse_t5_config
from nufilt_jax.models.t5_layers import MASKED, BlockStack, Encoded, KeysValues
from nufilt_jax.models.t5_names import to_t5_tree

_HIGHEST = jax.lax.Precision.HIGHEST
# Logits are float32, of bfloat16 factors too.
_product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def t5_logits(
    params: Mapping[str, ArrayLike],
    input_ids: Int[Array, "b t_enc"],
    attention_mask: Int[Array, "_ _"] | Bool[Array, "_ _"],
    decoder_input_ids: Int[Array, "_ t_dec"],
    config: Mapping[str, Any],
    *,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b t_dec vocab"]:
    """Logits of the token after each decoder input, in float32.

    Pure in the arrays, so it can be jitted and differentiated, and `vmap` over a leading axis of `params` runs
    several models of one shape in one program. `config` and `dtype` must not be traced.

    Args:
      params: the flat dict of a checkpoint, under the canonical (PyTorch) names, weights `[d_out, d_in]`. Their
        `lm_head.weight` is the head; without it the embedding is.
      input_ids: the encoder's tokens, padded on either side.
      attention_mask: zero at padding.
      decoder_input_ids: start token first; a position sees itself and those before it.
      config: `config.json` of a T5 model.
      dtype: float32, or bfloat16 with norms, softmax and logits in float32. Parameters are cast.

    Raises:
      CheckpointError: the config is not of a T5 model, a tensor is missing, unknown or of another shape, or the
        inputs do not belong together.
      ConfigError: another `dtype`.
    """
    t5 = parse_t5_config(config)
    tree = to_t5_tree(params, t5, dtype=dtype)
    return t5_tree_logits(tree, input_ids, attention_mask, decoder_input_ids, t5)


def t5_generate(
    params: Mapping[str, ArrayLike],
    input_ids: Int[Array, "b t_enc"],
    attention_mask: Int[Array, "_ _"] | Bool[Array, "_ _"],
    config: Mapping[str, Any],
    *,
    max_new_tokens: int,
    dtype: DTypeLike = jnp.float32,
) -> Int[Array, "b n"]:
    """The most likely next token, again and again (greedy search), in one compiled loop.

    Args:
      params: as for `t5_logits`.
      input_ids: as for `t5_logits`.
      attention_mask: as for `t5_logits`.
      config: as for `t5_logits`; must hold `decoder_start_token_id`.
      max_new_tokens: length of the result. The loop ends earlier if every text has ended.
      dtype: as for `t5_logits`.

    Returns:
      The tokens after the start token: the first end token included, `pad_token_id` after it. Of equally likely
      tokens the lowest is taken.

    Raises:
      CheckpointError: as for `t5_logits`, or the config has no start token.
      ConfigError: another `dtype`, or `max_new_tokens` below 1.
    """
    t5 = parse_t5_config(config)
    tree = to_t5_tree(params, t5, dtype=dtype)
    return t5_tree_generate(tree, input_ids, attention_mask, t5, max_new_tokens=max_new_tokens)


@functools.partial(jax.jit, static_argnames="config")
def t5_tree_logits(
    tree: Mapping[str, Any],
    input_ids: Int[Array, "b t_enc"],
    attention_mask: Int[Array, "_ _"] | Bool[Array, "_ _"],
    decoder_input_ids: Int[Array, "_ t_dec"],
    config: T5Config,
) -> Float[Array, "b t_dec vocab"]:
    """The same as `t5_logits` from a linen tree, which `to_t5_tree` makes once for many batches."""
    _check_inputs(input_ids, attention_mask, decoder_input_ids)
    module = T5Module(config, separate_head="lm_head" in tree)
    logits = module.apply({"params": tree}, input_ids, attention_mask, decoder_input_ids)
    assert isinstance(logits, jax.Array)  # for the type checker: apply may also return variables
    return logits


class _Search(NamedTuple):
    """Where greedy search stands."""

    step: Int[Array, ""]
    last: Int[Array, " b"]  # the token to feed next
    ended: Bool[Array, " b"]
    tokens: Int[Array, "b n"]
    cache: tuple[KeysValues, ...]  # of each decoder block


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens"))
def t5_tree_generate(
    tree: Mapping[str, Any],
    input_ids: Int[Array, "b t_enc"],
    attention_mask: Int[Array, "_ _"] | Bool[Array, "_ _"],
    config: T5Config,
    *,
    max_new_tokens: int,
) -> Int[Array, "b n"]:
    """The same as `t5_generate` from a linen tree, which `to_t5_tree` makes once for many batches."""
    _check_inputs(input_ids, attention_mask)
    start_token = _checked_start(config, max_new_tokens)
    apply = functools.partial(T5Module(config, separate_head="lm_head" in tree).apply, {"params": tree})
    memory: Any = apply(input_ids, attention_mask, method="encode")

    def unfinished(state: _Search) -> Bool[Array, ""]:
        return (state.step < max_new_tokens) & ~state.ended.all()

    def extend(state: _Search) -> _Search:
        found: Any = apply(state.last[:, None], memory, state.cache, state.step, method="decode")
        logits, cache = found
        best = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
        token = jnp.where(state.ended, config.pad_token_id, best)
        ended = state.ended
        for eos in config.eos_token_ids:
            ended = ended | (token == eos)
        return _Search(state.step + 1, token, ended, state.tokens.at[:, state.step].set(token), cache)

    n_texts = len(input_ids)
    start = _Search(
        step=jnp.int32(0),
        last=jnp.full(n_texts, start_token, jnp.int32),
        ended=jnp.zeros(n_texts, bool),
        tokens=jnp.full((n_texts, max_new_tokens), config.pad_token_id, jnp.int32),
        cache=tuple(_room(block, max_new_tokens) for block in memory.blocks),
    )
    return jax.lax.while_loop(unfinished, extend, start).tokens


def _room(like: KeysValues, n_tokens: int) -> KeysValues:
    """Empty keys and values for `n_tokens`."""
    n_texts, _, *rest = like.keys.shape
    zeros = jnp.zeros((n_texts, n_tokens, *rest), like.keys.dtype)
    return KeysValues(zeros, zeros)


def _checked_start(config: T5Config, max_new_tokens: int) -> int:
    if max_new_tokens < 1:
        raise ConfigError(Problem("max_new_tokens", f"must be at least 1, got {max_new_tokens}"))
    if config.decoder_start_token_id is None:
        what = "decoder_start_token_id is None, not a token id"
        raise CheckpointError(Problem("config.json", what, "state the token that every text starts with, T5's is 0"))
    return config.decoder_start_token_id


def _check_inputs(input_ids: Array, attention_mask: Array, decoder_input_ids: Array | None = None) -> None:
    if attention_mask.shape != input_ids.shape:
        what = f"shape is {attention_mask.shape}, that of input_ids is {input_ids.shape}"
        raise CheckpointError(Problem("attention_mask", what))
    if decoder_input_ids is not None and len(decoder_input_ids) != len(input_ids):
        what = f"{len(decoder_input_ids)} texts, input_ids holds {len(input_ids)}"
        raise CheckpointError(Problem("decoder_input_ids", what))


class T5Module(nn.Module):
    """Encoder, decoder and head. It computes in the dtype of its parameters."""

    config: T5Config
    separate_head: bool = False

    def setup(self) -> None:
        """Names the parts as the checkpoints do."""
        config = self.config
        self.shared = nn.Embed(config.vocab_size, config.d_model)
        self.encoder = BlockStack(config, config.num_layers)
        self.decoder = BlockStack(config, config.num_decoder_layers, is_decoder=True)
        if self.separate_head:
            self.lm_head = nn.Dense(config.vocab_size, use_bias=False, precision=_HIGHEST, dot_general=_product)

    def __call__(
        self,
        input_ids: Int[Array, "b t_enc"],
        attention_mask: Int[Array, "b t_enc"] | Bool[Array, "b t_enc"],
        decoder_input_ids: Int[Array, "b t_dec"],
    ) -> Float[Array, "b t_dec vocab"]:
        """Logits at every position of the decoder."""
        return self.decode(decoder_input_ids, self.encode(input_ids, attention_mask))[0]

    def encode(self, input_ids: Int[Array, "b t"], attention_mask: Int[Array, "b t"] | Bool[Array, "b t"]) -> Encoded:
        """What the decoder sees of the input."""
        visible = attention_mask.astype(bool)[:, None]
        states, _ = self.encoder(self.shared(input_ids), visible)
        return Encoded(self.decoder.keys_values(states), jnp.where(visible[:, None], 0.0, MASKED))

    def decode(
        self,
        token_ids: Int[Array, "b t"],
        memory: Encoded,
        cache: tuple[KeysValues, ...] | None = None,
        first: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "b t vocab"], tuple[KeysValues, ...]]:
        """Logits after each token, and the keys and values so far.

        Args:
          token_ids: the next tokens.
          memory: what `encode` returned.
          cache: keys and values of the tokens before, with room for these.
          first: position of the first token.
        """
        n_tokens = token_ids.shape[1]
        n_keys = n_tokens if cache is None else cache[0].keys.shape[1]
        visible = jnp.arange(n_keys)[None] <= first + jnp.arange(n_tokens)[:, None]
        hidden, cache = self.decoder(self.shared(token_ids), visible[None], memory, cache, first)
        if self.config.scale_outputs:
            hidden = hidden * self.config.d_model**-0.5
        if self.separate_head:
            return self.lm_head(hidden), cache
        return _product(hidden, self.shared.embedding, (((2,), (1,)), ((), ())), precision=_HIGHEST), cache
