"""The names in an adapter's weight file: which module, and what of it."""

import re
from typing import Literal, NamedTuple

from nufilt_jax.checkpoints.wrappers import without_peft

PREFIX = "base_model.model."
PROMPTS = "prompt tuning"
Kind = Literal["a", "b", "full", "copy", "foreign"]

# Older versions of peft leave the adapter's name in, `default` unless the user chose another.
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.\w+)?\.weight")
_SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save(\.\w+)?\.(?P<leaf>[\w.]+)")
_COPY = re.compile(r".+\.original_module\.[\w.]+")
# What other adapters store, and variants of LoRA, by the words in their names.
_FOREIGN = {
    r"\.lora_embedding_[AB]\b": "LoRA of an embedding",
    r"\.lora_magnitude_vector\b": "DoRA",
    r"\.lora_(E|mask)\b|\.ranknum\b": "AdaLoRA",
    r"\.hada_(w\d|t\d)": "LoHa",
    r"\.lokr_(w\d|t\d)": "LoKr",
    r"\.ia3_l\b": "IA³",
    r"(^|\.)prompt_embeddings\b|(^|\.)prompt_encoder(\.\w+)?\.(embedding|(mlp|lstm)_head)\b": PROMPTS,
    r"\.vera_(lambda|A|B)": "VeRA",
    r"\.(oft|boft)_": "OFT",
    r"\.trainable_tokens_delta\b": "trained tokens",
    r"\.lora_[AB](\.\w+)?\.bias$": "LoRA with biases of its own",
    r"lora_|_lora|adapter": "a variant of LoRA",
}


class Key(NamedTuple):
    """What a stored tensor is.

    Attributes:
      kind: a factor `a` or `b`, a `full` tensor in place of the base's, a `copy` of the base's, or `foreign`, unless
        that is what the base calls a tensor of its own.
      name: the module of a factor, as the model's class calls it; of another tensor its whole name.
      what: of a foreign one, the method that it belongs to.
    """

    kind: Kind
    name: str
    what: str = ""


def parse_key(stored: str) -> Key:
    """Reads a name in a PEFT file, of old and new versions.

    >>> parse_key("base_model.model.h.0.c_attn.lora_A.default.weight")
    Key(kind='a', name='h.0.c_attn', what='')
    >>> parse_key("base_model.model.score.modules_to_save.weight").name
    'score.weight'
    """
    name = without_peft(stored)
    if found := _FACTOR.fullmatch(name):
        return Key("a" if found["factor"] == "A" else "b", found["module"])
    if found := _SAVED.fullmatch(name):
        return Key("full", f"{found['module']}.{found['leaf']}")
    if _COPY.fullmatch(name):
        return Key("copy", name)
    whole = name.replace(".base_layer.", ".")
    for pattern, what in _FOREIGN.items():
        if re.search(pattern, name):
            return Key("foreign", whole, what)
    return Key("full", whole)
