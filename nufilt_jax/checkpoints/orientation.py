"""Which weights lie in a file as `[d_in, d_out]`: a fact about the model's classes, not about the format.

Read off the classes of transformers 4.57 and 5.24; names alone do not decide: GPT-BigCode's `c_attn` is a plain linear
layer. Flax kernels are in `names.flax_axes`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nufilt_jax.checkpoints.wrappers import bare

# Models made of `Conv1D`, which computes x W, and the weights that are; the code of the last two is on the Hub.
_CONV1D = {
    model: re.compile(r"(?:.*\.)?h\.\d+\.(?:attn|mlp|crossattention)\.(?:c_attn|c_proj|c_fc2?|q_attn|kv_attn)\.weight")
    for model in ("gpt2", "gpt-sw3", "imagegpt", "decision_transformer", "openai-gpt", "jais", "btlm")
}
# Its outputs are three times its inputs, or fewer if queries share keys, and never fewer than its inputs.
_FUSED_ATTENTION = re.compile(r"(?:.*\.)?h\.\d+\.attn\.c_attn\.weight")
_CONV1D["clvp"] = re.compile(r"(?:.*\.)?speech_decoder_model\..*\.mlp\.(?:c_fc|c_proj)\.weight")
_CONV1D["dbrx"] = re.compile(r"(?:.*\.)?ffn\.experts\.mlp\.w2")
# Models whose experts are multiplied as x W_e, their stacks `[e, d_in, d_out]`.
_EXPERTS = re.compile(r"(?:.*\.)?experts\.(?:gate_up_proj|down_proj|fc1\.weight|fc2\.weight)")
_TURNED_EXPERTS = ("gpt_oss", "openai_privacy_filter", "llama4", "llama4_text", "aria", "aria_text")
# Written in both ways, by the library's version: the shape tells.
_EITHER = ("qwen3_vl_moe", "qwen3_vl_moe_text")


def stored_axes(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, ...]:
    """Permutation from a stored torch tensor to `[d_out, d_in]`, or `[e, d_out, d_in]` of a stack of experts.

    Args:
      name: canonical name.
      shape: as stored.
      config: of the model; nested ones count for their part.

    >>> stored_axes("h.0.attn.c_attn.weight", (8, 24), {"model_type": "gpt2"})
    (1, 0)
    """
    name, as_stored = bare(name), tuple(range(len(shape)))
    for part in _parts(config):
        model = str(part.get("model_type", ""))
        if len(shape) == 2 and model in _CONV1D and _CONV1D[model].fullmatch(name):
            return (1, 0)
        is_turned = model in _TURNED_EXPERTS or (model in _EITHER and _begins_with_inputs(name, shape, part))
        if len(shape) == 3 and is_turned and _EXPERTS.fullmatch(name):
            return (0, 2, 1)
    return as_stored


def with_conv1d(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """The config of a model that is GPT-2's kin by the shapes of its weights, whatever it calls itself, as that of one.

    Args:
      config: of the model, with a `model_type` that need not be known, or with none.
      shapes: of its stored torch tensors, by name.

    >>> with_conv1d({"model_type": "own"}, {"h.0.attn.c_attn.weight": (8, 24)})
    {'model_type': 'own', 'by_shape': {'model_type': 'gpt2'}}
    >>> with_conv1d({"model_type": "own"}, {"h.0.attn.c_attn.weight": (24, 8)})
    {'model_type': 'own'}
    """
    fused = [shape for name, shape in shapes.items() if _FUSED_ATTENTION.fullmatch(bare(name)) and len(shape) == 2]
    width = config.get("n_embd", config.get("hidden_size"))
    is_turned = any(3 * n_in == n_out or width == n_in < n_out for n_in, n_out in fused)
    if not is_turned or any(part.get("model_type") in _CONV1D for part in _parts(config)):
        return config
    return {**config, "by_shape": {"model_type": "gpt2"}}


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config and those nested in it, as `text_config` or `decoder`."""
    yield config
    yield from (value for value in config.values() if isinstance(value, Mapping) and "model_type" in value)


def _begins_with_inputs(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    text = config.get("text_config")
    hidden = (text if isinstance(text, Mapping) else config).get("hidden_size")
    inputs, outputs = (1, 2) if "down_proj" not in name else (2, 1)
    return len(shape) == 3 and shape[inputs] == hidden != shape[outputs]
