"""How transformers 5 calls the modules of models whose files keep the names of the 4.x series.

It renames tensors as it reads them, by its own `conversion_mapping.py`; here is what that says in 5.23 of modules that
are renamed one by one, as routers. Those that it joins or splits, as experts, are not told of.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

_Rules = tuple[tuple[str, str], ...]

# (pattern, replacement), tried in this order; every one that matches is applied. None changes a newer name.
_MLP = ((r"\bintermediate\.dense\b", "mlp.fc1"), (r"(?<!attention\.)\boutput\.dense\b", "mlp.fc2"))
_OUT = (r"\battention\.output\.dense\b", "attention.o_proj")


def _attention(within: str) -> _Rules:
    new = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
    return (*((rf"\battention\.{within}\.{old}\b", f"attention.{name}") for old, name in new), _OUT)


_VIT = ((r"encoder\.layer\.", "layers."), *_attention("attention"), *_MLP)
_DINO = (*_attention("attention"), (r"\bmlp\.weights_out\b", "mlp.down_proj"))
_SWIN = (
    *_attention("self"),
    (
        r"\battention\.self\.relative_position_bias_table\b",
        "attention.relative_position_bias.relative_position_bias_table",
    ),
    *_MLP,
)
_SEGFORMER = (
    (r"\bencoder\.patch_embeddings\.(\d+)\.", r"stages.\1.patch_embeddings."),
    (r"\bencoder\.block\.(\d+)\.", r"stages.\1.blocks."),
    (r"\bencoder\.layer_norm\.(\d+)\b", r"stages.\1.layer_norm"),
    *_attention("self"),
    (r"\battention\.self\.sr\b", "attention.sequence_reduction.sequence_reduction"),
    (r"\battention\.self\.layer_norm\b", "attention.sequence_reduction.layer_norm"),
    (r"\bmlp\.dense([12])\b", r"mlp.fc\1"),
    (r"\blayer_norm_1\b", "layernorm_before"),
    (r"\blayer_norm_2\b", "layernorm_after"),
    (r"\bdecode_head\.linear_c\b", "decode_head.linear_projections"),
)


def _around(language: str, *others: str) -> _Rules:
    """Of a language model, and towers beside it, that are parts of one `model` now."""
    return (
        (rf"^{language}\.lm_head\b", "lm_head"),
        (rf"^{language}\.model\b", f"model.{language}"),
        (rf"^({'|'.join((language, *others))})\b", r"model.\1"),
        (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
    )


_LLAVA = _around("language_model", "vision_tower", "multi_modal_projector", "image_newline")
_AUDIO = _around("language_model", "audio_tower", "multi_modal_projector")
_QWEN_VL = ((r"^visual\b", "model.visual"), (r"^model\.(?!language_model\b|visual\b)", "model.language_model."))

_KINDS: tuple[tuple[str, _Rules], ...] = (
    ("audio-spectrogram-transformer beit deit ijepa vit vit_mae vit_msn vivit", _VIT),
    ("ViTMSNForImageClassification", ((r"^encoder\.", "vit.encoder."), *_VIT)),
    ("dinov2 dinov2_with_registers", _DINO),
    ("swin", _SWIN),
    ("segformer", _SEGFORMER),
    ("aria aya_vision gemma3 got_ocr2 internvl llava llava_next llava_next_video llava_onevision", _LLAVA),
    ("mistral3 paligemma pp_chart2table vipllava", _LLAVA),
    ("video_llava", _around("language_model", "image_tower", "video_tower", "multi_modal_projector")),
    ("mllama", _around("language_model", "vision_model", "multi_modal_projector")),
    ("fuyu", _around("language_model", "vision_embed_tokens")),
    ("emu3", _around("text_model", "vqmodel")),
    ("audioflamingo3 glmasr musicflamingo qwen2_audio voxtral", _AUDIO),
    ("granite_speech granite_speech_plus", _around("language_model", "encoder", "projector")),
    ("qwen2_vl qwen2_5_vl", _QWEN_VL),
    ("minimax minimax_m2 mixtral", ((r"\bblock_sparse_moe\.(gate|e_score_correction_bias)\b", r"mlp.\1"),)),
    (
        "granitemoe granitemoehybrid granitemoeshared",
        ((r"\bblock_sparse_moe\.router\.layer\b", "block_sparse_moe.router"),),
    ),
    ("phimoe", ((r"\bblock_sparse_moe\.gate\b", "mlp.router"),)),
    ("gpt_neox", ((r"^embed_out\b", "lm_head"),)),
)
_BY_TYPE = {model: rules for models, rules in _KINDS for model in models.split()}


def newer_names(names: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Each name as transformers 5 has it; newer ones, and those of other models, as they are.

    Args:
      names: of tensors or modules.
      config: the model's.

    >>> newer_names(["vit.encoder.layer.0.attention.output.dense"], {"model_type": "vit"})
    {'vit.encoder.layer.0.attention.output.dense': 'vit.layers.0.attention.o_proj'}
    """
    written = config.get("architectures")
    model = str(written[0]) if isinstance(written, list) and written else ""
    rules = _BY_TYPE.get(model) or _BY_TYPE.get(str(config.get("model_type", "")), ())
    if model.endswith("Model"):  # what other classes call `model.`
        rules = (*rules, (r"^model\.", "")) if rules else ()
    return {name: _renamed(name, rules) for name in names}


def is_saved_by_newer(config: Mapping[str, Any]) -> bool:
    """Whether a model's config is one of transformers 5, by the version in it."""
    major = re.match(r"\d+", str(config.get("transformers_version", "")))
    return major is not None and int(major[0]) >= 5


def _renamed(name: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
