"""Canonical names: those of the Hugging Face PyTorch classes of the 4.x series.

Other spellings that this module reads:

* `transformers` 5 drops `vision_model.` / `text_model.` from CLIPVisionModel / CLIPTextModel,
  and `vision_model.` from the vision tower of LLaVA;
* LLaVA of 4.52 and later may write `model.language_model.X` for `language_model.model.X`;
* the first BERTs call the weight and the bias of a LayerNorm `gamma` and `beta`, as TensorFlow does;
* torch 2 calls the parts of a weight norm `parametrizations.weight.original0` and `1`, and before `weight_g` and `_v`;
* modules that transformers 5 calls otherwise than the files, as an adapter does, are in `newer_names`;
* Flax writes paths joined by `/`, with `kernel`, `scale` and `embedding` for `weight`.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from nufilt_jax.checkpoints.wrappers import around

_VISION_PARTS = r"(embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.|class_pos_emb$)"
_TEXT_PARTS = r"(embeddings|encoder|final_layer_norm)\."

# (pattern, replacement), tried in this order; every one that matches is applied.
_LLAVA_RULES = (
    (r"^model\.(language_model|vision_tower|multi_modal_projector|image_newline)\b", r"\1"),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^language_model\.(layers|embed_tokens|norm)\.", r"language_model.model.\1."),
    (rf"^vision_tower\.{_VISION_PARTS}", r"vision_tower.vision_model.\1"),
)
_VISION_RULES = ((rf"^{_VISION_PARTS}", r"vision_model.\1"),)
_TEXT_RULES = ((rf"^{_TEXT_PARTS}", r"text_model.\1."),)
# Of any model. A `gamma` elsewhere is a parameter of its own: the scale of a layer in ConvNeXt, BEiT and DINO.
_RULES = (
    (r"(^|\.)LayerNorm\.gamma$", r"\1LayerNorm.weight"),
    (r"(^|\.)LayerNorm\.beta$", r"\1LayerNorm.bias"),
    (r"(^|\.)parametrizations\.weight\.original0$", r"\1weight_g"),
    (r"(^|\.)parametrizations\.weight\.original1$", r"\1weight_v"),
)

_FLAX_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def canonical_names(stored_names: Collection[str]) -> dict[str, str]:
    """Canonical name of each stored name (torch spelling, either series).

    A model is recognised by its names, not by its config: a task's config may be missing.

    >>> canonical_names(["model.multi_modal_projector.linear_1.bias", "lm_head.weight"])["lm_head.weight"]
    'language_model.lm_head.weight'
    """
    start = _around_all(stored_names)
    rules = _rules_for({name.removeprefix(start) for name in stored_names})
    return {name: start + _apply(rules, name.removeprefix(start)) for name in stored_names}


def respelt(names: Collection[str]) -> dict[str, str]:
    """Canonical names of tensors that were read already, now that a prefix is gone that hid what model they are of."""
    rules = _rules_for(names)
    return {name: _apply(rules, name) if rules else name for name in names}


def names_like(names: Collection[str], base: Collection[str]) -> dict[str, str]:
    """Canonical names of tensors of a model that is known by its base: as an adapter's, which has few of them.

    Args:
      names: stored names, torch spelling.
      base: canonical names of the base.
    """
    start = _around_all(base)
    base = {name.removeprefix(start) for name in base}
    rules = _rules_for(base)
    for prefix, more in (("vision_model.", _VISION_RULES), ("text_model.", _TEXT_RULES)):
        # Of a model with both towers, names without a tower's could be either's.
        if not rules and base and all(name.startswith(prefix) for name in base):
            rules = more
    return {name: _apply(rules, name) for name in names}


def _around_all(names: Collection[str]) -> str:
    """The wrappers of a whole model, that all its names begin with."""
    starts = {around(name) for name in names}
    return starts.pop() if len(starts) == 1 else ""


def _rules_for(names: Collection[str]) -> tuple[tuple[str, str], ...]:
    if any(re.match(r"(model\.)?multi_modal_projector\.", name) for name in names):
        return _LLAVA_RULES
    if "embeddings.patch_embedding.weight" in names and any(n.startswith("encoder.layers.") for n in names):
        return _VISION_RULES
    if "embeddings.token_embedding.weight" in names and "final_layer_norm.weight" in names:
        return _TEXT_RULES
    return ()


def _apply(rules: tuple[tuple[str, str], ...], name: str) -> str:
    for pattern, replacement in (*rules, *_RULES):
        name = re.sub(pattern, replacement, name)
    return name


def from_flax_name(path: str) -> str:
    """Torch spelling of a Flax path.

    >>> from_flax_name("encoder/layers/0/layer_norm1/scale")
    'encoder.layers.0.layer_norm1.weight'
    """
    *modules, leaf = path.split("/")
    return ".".join([*modules, _FLAX_LEAVES.get(leaf, leaf)])


def flax_axes(path: str, n_axes: int) -> tuple[int, ...]:
    """Permutation from a Flax array to the torch orientation: kernels are `[..., in, out]` there.

    >>> flax_axes("patch_embedding/kernel", 4)
    (3, 2, 0, 1)
    """
    if path.rsplit("/", 1)[-1] != "kernel" or n_axes < 2:
        return tuple(range(n_axes))
    return (n_axes - 1, n_axes - 2, *range(n_axes - 2))


def has_flax_form(config: Mapping[str, Any]) -> bool:
    """Whether HF Flax has classes for this model, and this module knows their names."""
    return _family(config) is not None


def to_flax_name(name: str, n_axes: int, config: Mapping[str, Any]) -> str:
    """Flax path of a canonical name, for the models of `has_flax_form`.

    >>> to_flax_name("shared.weight", 2, {"model_type": "t5"})
    'shared/embedding'
    """
    *modules, leaf = name.split(".")
    if leaf == "weight":
        leaf = _flax_leaf(modules[-1] if modules else "", n_axes, _family(config))
    return "/".join([*modules, leaf])


def _flax_leaf(module: str, n_axes: int, family: str | None) -> str:
    if n_axes < 2:
        return "weight" if family == "t5" else "scale"  # FlaxT5LayerNorm keeps torch's name
    lookups = {"shared", "embed_tokens", "relative_attention_bias", "token_embedding", "position_embedding"}
    return "embedding" if module in lookups else "kernel"


def _family(config: Mapping[str, Any]) -> str | None:
    model_type = str(config.get("model_type", ""))
    if model_type in ("clip", "clip_vision_model", "clip_text_model"):
        return "clip"
    return "t5" if model_type in ("t5", "mt5") else None
