"""The numbers of a T5 encoder-decoder, as its `config.json` states them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

from nufilt_jax.errors import CheckpointError, Problem, raise_all

FeedForward = Literal["relu", "gated-gelu", "gated-silu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Shape and special tokens of a T5. Hashable, so `jit` takes it as a static argument.

    The defaults are those of transformers' `T5Config`, which leaves a value out of `config.json` where it
    equals its default.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64  # width of one head; heads need not fill d_model
    d_ff: int = 2048
    num_layers: int = 6  # blocks of the encoder
    num_decoder_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128  # all distances from here on share one bucket
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: FeedForward = "relu"
    has_head: bool = False  # an `lm_head.weight` must be there; otherwise the embedding may serve
    scale_outputs: bool = True  # hidden states are scaled by d_model^-0.5 before the head
    pad_token_id: int = 0
    eos_token_ids: tuple[int, ...] = (1,)  # any of these ends a text
    decoder_start_token_id: int | None = None

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layers are those of T5 1.1."""
        return self.feed_forward_proj.startswith("gated-")


def parse_t5_config(config: Mapping[str, Any]) -> T5Config:
    """Reads a T5's numbers out of a `config.json` of either transformers series.

    The 4.x series writes `tie_word_embeddings`, which says both whether the embedding serves as head and
    whether the hidden states are scaled. The 5.x series writes true there, whatever the model, and keeps the
    second meaning in `scale_decoder_outputs`; there the embedding is the head where the file has no other.

    Raises:
      CheckpointError: it is another kind of model, or a value has the wrong type or is out of range.
    """
    if config.get("model_type") != "t5":
        what = f"model_type is {config.get('model_type')!r}, not 't5'"
        raise CheckpointError(Problem("config.json", what, "use the config.json of a T5 model"))
    tied = config.get("tie_word_embeddings", True) is not False
    eos = config.get("eos_token_id", 1)
    given: dict[str, Any] = {
        "has_head": not tied,
        "scale_outputs": tied and config.get("scale_decoder_outputs", True) is not False,
        "eos_token_ids": () if eos is None else tuple(cast(list[Any], eos)) if isinstance(eos, list) else (eos,),
    }
    if config.get("num_decoder_layers") is None:
        given["num_decoder_layers"] = config.get("num_layers", T5Config.num_layers)
    fields = dataclasses.fields(T5Config)
    values = {field.name: config.get(field.name, field.default) for field in fields} | given
    raise_all(CheckpointError, (Problem("config.json", what) for what in _problems(values)))
    return T5Config(**values)


def _problems(values: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    sizes = [field.name for field in dataclasses.fields(T5Config) if field.type is int and field.name != "pad_token_id"]
    for name in sizes:
        if not _is_integer(values[name], least=1):
            found.append(f"{name} is {values[name]!r}, not a positive integer")
    eps, kind = values["layer_norm_epsilon"], values["feed_forward_proj"]
    if not isinstance(eps, float) or not 0 < eps < 1:
        found.append(f"layer_norm_epsilon is {eps!r}, not a number between 0 and 1")
    if kind not in get_args(FeedForward):
        found.append(f"feed_forward_proj is {kind!r}, not one of {', '.join(map(repr, get_args(FeedForward)))}")
    tokens = [("pad_token_id", values["pad_token_id"]), *(("eos_token_id", eos) for eos in values["eos_token_ids"])]
    if values["decoder_start_token_id"] is not None:
        tokens.append(("decoder_start_token_id", values["decoder_start_token_id"]))
    found += [f"{name} is {token!r}, not a token id" for name, token in tokens if not _is_integer(token, least=0)]
    if not found:
        found += _bucket_problems(values["relative_attention_num_buckets"], values["relative_attention_max_distance"])
    return found


def _bucket_problems(n_buckets: int, max_distance: int) -> list[str]:
    # Half of the buckets, or a quarter in each direction, are for one distance each; the rest grow up to the maximum.
    if n_buckets < 4:
        return [f"relative_attention_num_buckets is {n_buckets}, fewer than 4"]
    if max_distance <= n_buckets // 2:
        what = f"relative_attention_max_distance {max_distance} is not above half of the {n_buckets} buckets"
        return [what]
    return []


def _is_integer(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
