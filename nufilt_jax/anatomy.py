"""What a tensor of a model is, told by its canonical name and shape: block, layer, head, lookup table, buffer.

Names are facts that reading, selecting and reporting share, so they stand in one place (DESIGN §10).
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

Shape = tuple[int, ...]
ModelFamily = Literal["clip", "llava", "other"]

# A numbered block: `layers.3.`, `h.3.`, `resblocks.3.`, `albert_layers.3.`, `stages.3.`, and `experts.3.` inside one;
# `layer2.3.` of the ResNets of torchvision and timm, and the blocks of conformers and of Perceiver.
_BLOCK = re.compile(
    r"(?:^|\.)(?:h|\w*layers?|layer\d+|\w*blocks?|\w*stages?|\w*layer_groups|encoders|conformer|self_attends)\.\d+\."
)
# What is looked up and not multiplied with: embeddings, tables of relative positions.
_LOOKUP = re.compile(
    r"(?:.*\.)?(?:shared|wte|wpe|\w*embed(?:ding|dings)?|embed_\w+|\w*embeds?_layers\.\d+|rel_embeddings|rel_attn_embed"
    r"|rel_pos_\w+|(?:\w+_)?ape|relative_attention_bias|relative_position_bias_table|relative_position_index)(?:\.weights?)?"
)
_VOCABULARY = re.compile(
    r"(?:w|(?:.*\.)?(?:transformer\.w|shared|wte|\w*embed_tokens|tokens_embed|embed_in|\w*word_embeddings?|tok_embeddings"
    r"|\w*token_embedding|entity_embeddings|embeddings?|lm_head|shared_head\.head))\.weight"
)
_NORM = re.compile(
    r"(?:.*\.)?(?:\w*norm\w*|ln_?\w*|\w*_ln|layer_?norm\w*)(?:\.\d+)?\.(?:weight|scale|gamma|beta)", re.I
)
_ROUTER = re.compile(r"(?:.*\.)?(?:(?:\w*router\w*|gate)(?:\.\w+)*|shared_expert_gate|wg)(?:\.weight)?")
_BIAS = re.compile(r"(?:.*[._])?bias(?:es|_[a-z])?")
# The numbers of quantisers, and the recurrence of state-space and RWKV blocks: two axes, and no linear map.
_SCALE = re.compile(
    r"(?:.*\.)?(?:A_log|D|\w*scales?(?:_inv)?|zeros?|_shift|codebooks?|\w*centroids(?:\.weight)?|translate|time_\w+"
    r"|layer_scale\w*|lambda\w*)"
)
# Under a module of this name, or with the leaves of GraniteMoE and JetMoE, three axes are a stack of experts.
_EXPERTS = re.compile(r"(?:^|\.)\w*experts?\.|\.(?:input|output)_linear\.weight$")
_CONVOLUTION = re.compile(r"conv|patch_embed", re.I)
# Outside the blocks: what a task adds to a backbone, or has in a size of its own.
_HEAD = re.compile(
    r"(?:[\w]+\.)?(?:\w*heads?|\w*classifiers?|score|summary|cls|qa_outputs|pooler|predictions|\w+_predictions|proj_out"
    r"|projector(?!\.qformer\.)|vocab_\w+|generator_\w+|span_\w+|logits_\w+|pre_logits|embed_out|fc|fc_norm|lm_loss|pred_layer"
    # What training before the tasks alone needs. A whole `decoder` is a stack, and a `quantizer` of layers a codec's.
    r"|(?:embeddings\.)?mask_token|decoder(?:\.\d+)?\.(?:weight|bias)|project_(?:hid|q)"
    r"|quantizer\.(?:codevectors|weight_proj))(?:\.\w+)*"
)
# Computed from the config and never trained: some versions of a library store them, others do not.
_BUFFER = re.compile(
    r"(?:.*\.)?(?:(?:original_|local_|global_)?inv_freq|(?:cos|sin)_cached|masked_bias|position_ids|token_type_ids"
    r"|relative_position_index|relative_coords_table|attn_mask|causal_mask|num_batches_tracked|final_logits_bias"
    r"|embed_positions\.weights|sinusoidal_embeddings|rotary_emb\.freqs)"
)
# Blocks that predict further tokens: under a name of their own, or numbered on behind the model's, with these members.
_FURTHER = re.compile(r"(?:^|\.)mtp(?:_\w+)?\.")
_FURTHER_BLOCK = re.compile(r"(.+\.\d+\.)(?:eh_proj|shared_head)\.")
_MASK = re.compile(r"(?:.*\.)?(?:attn|attention)\.(?:bias|mask)")


def in_block(name: str) -> bool:
    """Whether a tensor belongs to a numbered block.

    >>> in_block("bert.encoder.layer.0.output.dense.weight"), in_block("classifier.dense.weight")
    (True, False)
    """
    found = _BLOCK.search(name)
    return found is not None and not is_head_name(name[: found.start()])


def is_lookup(name: str) -> bool:
    """An embedding or another table whose rows are looked up."""
    return _LOOKUP.fullmatch(name) is not None


def is_norm(name: str) -> bool:
    """A weight or a bias of a norm.

    >>> [is_norm(n) for n in ("layernorm.bias", "beit.pooler.layernorm.weight", "pooler.dense.bias")]
    [True, True, False]
    """
    return _NORM.fullmatch(re.sub(r"\.bias$", ".weight", name)) is not None


def is_vocabulary(name: str) -> bool:
    """A table with a row for each token."""
    return _VOCABULARY.fullmatch(name) is not None


def is_buffer(name: str, shape: Shape) -> bool:
    """A tensor that is computed and not trained, as rotary frequencies and causal masks."""
    return _BUFFER.fullmatch(name) is not None or (len(shape) == 4 and _MASK.fullmatch(name) is not None)


def is_head_name(name: str) -> bool:
    """Whether a name without block begins, behind the backbone's own prefix perhaps, with that of a head."""
    return bool(name) and _HEAD.fullmatch(name) is not None


def is_head(name: str) -> bool:
    """A tensor outside the blocks that tasks have each of its own: classifiers, language heads, poolers.

    >>> [is_head(n) for n in ("classifier.weight", "model.score.weight", "bert.pooler.dense.bias", "norm.weight")]
    [True, True, True, False]
    """
    return not in_block(name) and is_head_name(name)


def is_experts(name: str, shape: Shape) -> bool:
    """A stack of experts' matrices `[e, d_out, d_in]`."""
    return len(shape) == 3 and in_block(name) and _EXPERTS.search(name) is not None and not _is_no_map(name)


def is_convolution(name: str, shape: Shape) -> bool:
    """The kernel of a convolution `[out, in, ...]` inside a block."""
    named = len(shape) == 3 and _CONVOLUTION.search(name) is not None
    return (len(shape) in (4, 5) or named) and in_block(name) and not _is_no_map(name) and not is_buffer(name, shape)


def is_linear(name: str, shape: Shape) -> bool:
    """The matrix of a linear layer inside a block, fused ones included; also a stack of experts' matrices."""
    if is_experts(name, shape):
        return True
    return len(shape) == 2 and in_block(name) and not _is_no_map(name) and not is_buffer(name, shape)


def _is_no_map(name: str) -> bool:
    return any(kind.fullmatch(name) for kind in (_LOOKUP, _VOCABULARY, _NORM, _ROUTER, _BIAS, _SCALE))


def multi_token_prediction(names: Iterable[str]) -> frozenset[str]:
    """The tensors of blocks that predict tokens beyond the next, which `transformers` drops when it loads a model.

    >>> sorted(multi_token_prediction(["layers.4.eh_proj.weight", "layers.4.enorm.weight", "layers.3.up.weight"]))
    ['layers.4.eh_proj.weight', 'layers.4.enorm.weight']
    """
    names = tuple(names)
    blocks = tuple({found[1] for name in names if (found := _FURTHER_BLOCK.match(name))})
    return frozenset(name for name in names if name.startswith(blocks) or _FURTHER.search(name))


# All that a block of CLIP's vision tower has.
_CLIP_BLOCK = re.compile(r"vision_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp|layer_norm[12])\.")
_NOT_CLIP = re.compile(r"vision_model\.(?:head\.|embeddings\.patch_embedding\.bias)")  # SigLIP's


def family_of(names: Iterable[str]) -> ModelFamily:
    """The family of models whose published choice of layers is known and narrower than all linear layers.

    By names, since a task's config may be missing. Many models call a tower `vision_model`. CLIP's has blocks of its
    own make, and there are no blocks beside it but those of `text_model`: no language model, decoder or query former.
    """
    names = tuple(names)
    if any(name.startswith(("multi_modal_projector.", "vision_tower.")) for name in names):
        return "llava"
    blocks = [name for name in names if in_block(name) and not name.startswith("text_model.")]
    is_clip = blocks and all(map(_CLIP_BLOCK.match, blocks)) and not any(map(_NOT_CLIP.match, names))
    return "clip" if is_clip else "other"


_PART = re.compile(r"(?P<tensor>.+)\[(?P<index>\d+|:)\]")
FLAT = "[:]"


def layers_in(name: str, shape: Shape, *, flat: bool = False) -> tuple[str, ...]:
    """Names of the layers that a tensor is made of: `NAME[i]` of a stack of experts, `NAME[:]` of a kernel laid flat.

    Args:
      name: canonical name.
      shape: its shape.
      flat: whether convolutions are matrices `[out, in * kh * kw]`.

    >>> layers_in("layers.0.experts.down_proj", (2, 4, 8)), layers_in("a.weight", (4, 8))
    (('layers.0.experts.down_proj[0]', 'layers.0.experts.down_proj[1]'), ('a.weight',))
    """
    if is_experts(name, shape):
        return tuple(f"{name}[{i}]" for i in range(shape[0]))
    return (name + FLAT,) if flat and is_convolution(name, shape) else (name,)


def part_of(layer: str) -> tuple[str, int | None]:
    """The tensor that a layer is in, and which matrix of it; None for the whole."""
    found = _PART.fullmatch(layer)
    if found is None:
        return layer, None
    return found["tensor"], None if found["index"] == ":" else int(found["index"])


def tensor_of(layer: str) -> str:
    """The tensor that a layer is in."""
    return part_of(layer)[0]


class Shaped(Protocol):
    """Whatever has a shape."""

    @property
    def shape(self) -> Shape:
        """Its shape."""
        ...


def shape_in(model: Mapping[str, Shaped], layer: str) -> Shape:
    """Shape of a layer of a model."""
    return layer_shape(layer, model[tensor_of(layer)].shape)


def layer_shape(layer: str, shape: Shape) -> Shape:
    """Shape of a layer, from that of its tensor."""
    if layer.endswith(FLAT):
        return shape[0], math.prod(shape[1:])
    return shape if part_of(layer)[1] is None else shape[1:]
