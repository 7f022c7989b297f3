"""The two stacks of a T5, under the names of Hugging Face's Flax class.

They compute in the dtype of their parameters; norms, scores and softmax in float32.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from nufilt_jax.models.experts import gate_weights, mixed_dense
from nufilt_jax.models.t5_config import T5Config
from nufilt_jax.models.t5_positions import relative_buckets

# Finite: a query that sees nothing attends to all keys alike, without NaN.
MASKED = float(jnp.finfo(jnp.float32).min)
_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gated-gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gated-silu": jax.nn.silu,
}
_dense = functools.partial(nn.Dense, use_bias=False, precision=jax.lax.Precision.HIGHEST)


class KeysValues(NamedTuple):
    """What one attention looks at."""

    keys: Float[Array, "b k heads e"]
    values: Float[Array, "b k heads e"]

    def written(self, new: "KeysValues", first: Int[Array, ""] | int) -> "KeysValues":
        """With `new` in the place of the tokens from `first` on."""
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=1)
        return KeysValues(write(self.keys, new.keys), write(self.values, new.values))


class Encoded(NamedTuple):
    """What the decoder sees of the encoder: for each of its blocks, and which keys are padding."""

    blocks: tuple[KeysValues, ...]
    bias: Float[Array, "b 1 1 k"]  # zero, or MASKED


class BlockStack(nn.Module):
    """The encoder's blocks or the decoder's, and the norm after the last."""

    config: T5Config
    n_blocks: int
    is_decoder: bool = False

    def setup(self) -> None:
        """Names the parts as the checkpoints do."""
        self.block = _Blocks(self.config, self.n_blocks, self.is_decoder)
        self.final_layer_norm = _Norm(self.config.layer_norm_epsilon)

    def __call__(
        self,
        hidden: Float[Array, "b t d"],
        visible: Bool[Array, "#b #t k"],
        memory: Encoded | None = None,
        cache: Sequence[KeysValues] | None = None,
        first: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "b t d"], tuple[KeysValues, ...]]:
        """States of the tokens, and every block's own keys and values.

        Args:
          hidden: embedded tokens.
          visible: which keys each token may see.
          memory: the encoder's, if this is the decoder.
          cache: keys and values of each block with room for these tokens; without it they see only each other.
          first: position of the first token.
        """
        layers = [member.layer for member in self.block.members]
        queries = first + jnp.arange(hidden.shape[1])
        # All blocks share the table of the first.
        table = layers[0].first.SelfAttention.position_bias(
            queries, visible.shape[-1], bidirectional=not self.is_decoder
        )
        bias = jnp.where(visible[:, None], table[None], MASKED)
        seen: list[KeysValues] = []
        for index, layer in enumerate(layers):
            hidden, own = layer.first(hidden, bias, None if cache is None else cache[index], first)
            if memory is not None:
                hidden = layer.cross(hidden, memory.blocks[index], memory.bias)
            hidden = layer.last(hidden)
            seen.append(own)
        return self.final_layer_norm(hidden), tuple(seen)

    def keys_values(self, states: Float[Array, "b k d"]) -> tuple[KeysValues, ...]:
        """What each block of the decoder sees of the encoder's states."""
        return tuple(member.layer.cross.EncDecAttention.keys_values(states) for member in self.block.members)


class _Blocks(nn.Module):
    config: T5Config
    n_blocks: int
    is_decoder: bool

    def setup(self) -> None:
        numbers = range(self.n_blocks)
        self.members = [_Block(self.config, self.is_decoder, number == 0, name=str(number)) for number in numbers]


class _Block(nn.Module):
    config: T5Config
    is_decoder: bool
    has_table: bool

    def setup(self) -> None:
        self.layer = _Layers(self.config, self.is_decoder, self.has_table)


class _Layers(nn.Module):
    config: T5Config
    is_decoder: bool
    has_table: bool

    def setup(self) -> None:
        self.first = _SelfAttentionLayer(self.config, self.has_table, name="0")
        if self.is_decoder:
            self.cross = _CrossAttentionLayer(self.config, name="1")
        self.last = _FeedForwardLayer(self.config, name="2" if self.is_decoder else "1")


class _SelfAttentionLayer(nn.Module):
    config: T5Config
    has_table: bool

    def setup(self) -> None:
        self.SelfAttention = _Attention(self.config, self.has_table)
        self.layer_norm = _Norm(self.config.layer_norm_epsilon)

    def __call__(
        self,
        hidden: Float[Array, "b t d"],
        bias: Float[Array, "#b heads t k"],
        cache: KeysValues | None,
        first: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "b t d"], KeysValues]:
        normed = self.layer_norm(hidden)
        own = self.SelfAttention.keys_values(normed)
        if cache is not None:
            own = cache.written(own, first)
        return hidden + self.SelfAttention(normed, own, bias), own


class _CrossAttentionLayer(nn.Module):
    config: T5Config

    def setup(self) -> None:
        self.EncDecAttention = _Attention(self.config, has_table=False)
        self.layer_norm = _Norm(self.config.layer_norm_epsilon)

    def __call__(
        self, hidden: Float[Array, "b t d"], memory: KeysValues, bias: Float[Array, "b 1 1 k"]
    ) -> Float[Array, "b t d"]:
        return hidden + self.EncDecAttention(self.layer_norm(hidden), memory, bias)


class _Attention(nn.Module):
    config: T5Config
    has_table: bool

    def setup(self) -> None:
        config = self.config
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = _dense(inner), _dense(inner), _dense(inner)
        self.o = _dense(config.d_model)
        if self.has_table:
            self.relative_attention_bias = nn.Embed(config.relative_attention_num_buckets, config.num_heads)

    def keys_values(self, states: Float[Array, "b k d"]) -> KeysValues:
        return KeysValues(self._heads(self.k(states)), self._heads(self.v(states)))

    def __call__(
        self, hidden: Float[Array, "b t d"], seen: KeysValues, bias: Float[Array, "#b #heads #t k"]
    ) -> Float[Array, "b t d"]:
        # T5 does not divide by the root of the head's width: its initial weights did. Sums and softmax in float32.
        product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        scores = product("bqhe,bkhe->bhqk", self._heads(self.q(hidden)), seen.keys) + bias
        weights = jax.nn.softmax(scores, axis=-1).astype(hidden.dtype)
        mixed = product("bhqk,bkhe->bqhe", weights, seen.values).astype(hidden.dtype)
        return self.o(mixed.reshape(*hidden.shape[:2], -1))

    def position_bias(
        self, queries: Int[Array, " t"], n_keys: int, *, bidirectional: bool
    ) -> Float[Array, "heads t k"]:
        rows = relative_buckets(
            jnp.arange(n_keys)[None] - queries[:, None],
            bidirectional=bidirectional,
            n_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        return jnp.transpose(self.relative_attention_bias(rows), (2, 0, 1)).astype(jnp.float32)

    def _heads(self, full: Float[Array, "b n inner"]) -> Float[Array, "b n heads e"]:
        return full.reshape(*full.shape[:2], self.config.num_heads, self.config.d_kv)


class _FeedForwardLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        normed = _Norm(self.config.layer_norm_epsilon, name="layer_norm")(hidden)
        return hidden + _FeedForward(self.config, name="DenseReluDense")(normed)


class _FeedForward(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        if self.has_variable("params", "gate"):
            return self._mixed(hidden)
        activate, inner = _ACTIVATIONS[self.config.feed_forward_proj], self.config.d_ff
        if self.config.is_gated:
            mixed = activate(_dense(inner, name="wi_0")(hidden)) * _dense(inner, name="wi_1")(hidden)
        else:
            mixed = activate(_dense(inner, name="wi")(hidden))
        return _dense(self.config.d_model, name="wo")(mixed)

    def _mixed(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The same with weights that are mixed anew for every batch, see `models.experts`."""
        activate = _ACTIVATIONS[self.config.feed_forward_proj]
        names = ("gate", "wi_0", "wi_1") if self.config.is_gated else ("gate", "wi")
        gate, *first = (self.get_variable("params", name) for name in names)
        weights = gate_weights(gate, hidden)
        inner, *linear = (mixed_dense(layer, weights, hidden) for layer in first)
        mixed = activate(inner) * linear[0] if linear else activate(inner)
        return mixed_dense(self.get_variable("params", "wo"), weights, mixed)


class _Norm(nn.Module):
    """Division by the root mean square, without mean and bias; in float32."""

    eps: float

    @nn.compact
    def __call__(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        weight = self.param("weight", nn.initializers.ones, hidden.shape[-1:])
        wide = hidden.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return weight[None, None] * (wide * scale).astype(hidden.dtype)
