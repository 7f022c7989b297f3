"""Tiny models in the names and layouts that transformers writes (families.json), and which of their tensors are layers.

The table of layers is written by hand from the papers and the models' code; it shares nothing with the package.
"""

import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from model_builders import write_weights
from safetensors.numpy import load_file

FAMILIES = json.loads(Path(__file__).with_name("families.json").read_text())["families"]
FILTER = ("--filter-rank", "4", "--decomposition", "svd")  # which compiles fastest
RANKS = (*FILTER, "--adapter-rank", "2", "--task-rank", "2", "--steps", "4")
SCALE = 0.05  # of a task's update, beside weights of order one

_BERT = "encoder.layer.{0,1}.{attention.self.{query,key,value},{attention.output,intermediate,output}.dense}.weight"
_VIT = "encoder.layer.{0,1}.{attention.attention.{query,key,value},{attention.output,intermediate,output}.dense}.weight"
_ATTENTION = "self_attn.{q,k,v,o}_proj.weight"
_LLAMA = "layers.{0,1}.{self_attn.{q,k,v,o},mlp.{gate,up,down}}_proj.weight"
_GPT2 = "h.{0,1}.{attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj}.weight"
_TOWER = "encoder.layers.{0,1}.{self_attn.{q,k,v,out}_proj,mlp.{fc1,fc2}}.weight"
_SPEECH = (
    "model.encoder.layers.{0,1}.{self_attn.{q,k,v,out}_proj,fc1,fc2}.weight",
    "model.decoder.layers.{0,1}.{self_attn.{q,k,v,out}_proj,encoder_attn.{q,k,v,out}_proj,fc1,fc2}.weight",
)
_STACKED = (f"model.layers.{{0,1}}.{_ATTENTION}", "model.layers.{0,1}.mlp.experts.{gate_up_proj,down_proj}[{0,1,2}]")

# What a merge works on unless told otherwise, with braces as a shell reads them.
LAYERS = {
    "bert": (f"bert.{_BERT}",),
    "bert_model": (_BERT,),
    "sentence_transformers": (_BERT,),
    "roberta": (f"roberta.{_BERT}",),
    "distilbert": ("distilbert.transformer.layer.{0,1}.{attention.{q,k,v,out}_lin,ffn.{lin1,lin2}}.weight",),
    "gpt2": (f"transformer.{_GPT2}",),
    "gpt2_model": (_GPT2,),
    "llama": (f"model.{_LLAMA}",),
    "llama_model": (_LLAMA,),
    "qwen2": (f"model.{_LLAMA}",),
    "qwen3": (f"model.{_LLAMA}",),
    "mistral": (f"model.{_LLAMA}",),
    "gemma": (f"model.{_LLAMA}",),
    "mixtral": (
        f"model.layers.{{0,1}}.{_ATTENTION}",
        "model.layers.{0,1}.block_sparse_moe.experts.{0,1,2}.{w1,w2,w3}.weight",
    ),
    "qwen3_moe": (
        f"model.layers.{{0,1}}.{_ATTENTION}",
        "model.layers.{0,1}.mlp.experts.{0,1,2}.{gate,up,down}_proj.weight",
    ),
    "mixtral_stacked": _STACKED,
    "qwen3_moe_stacked": _STACKED,
    "gpt_oss": _STACKED,
    "llama4": (
        f"model.layers.{{0,1}}.{_ATTENTION}",
        "model.layers.0.feed_forward.{gate,up,down}_proj.weight",
        "model.layers.1.feed_forward.shared_expert.{gate,up,down}_proj.weight",
        "model.layers.1.feed_forward.experts.{gate_up_proj,down_proj}[{0,1,2}]",
    ),
    "qwen3_vl_moe": (
        f"model.language_model.layers.{{0,1}}.{_ATTENTION}",
        "model.language_model.layers.{0,1}.mlp.experts.{gate_up_proj,down_proj}[{0,1,2}]",
        "model.visual.blocks.{0,1}.{attn.{qkv,proj},mlp.{linear_fc1,linear_fc2}}.weight",
    ),
    "phi3": ("model.layers.{0,1}.{self_attn.{qkv_proj,o_proj},mlp.{gate_up_proj,down_proj}}.weight",),
    "vit": (f"vit.{_VIT}",),
    "vit_model": (_VIT,),
    "dinov2": (
        "dinov2.encoder.layer.{0,1}.{attention.attention.{query,key,value},attention.output.dense,mlp.{fc1,fc2}}.weight",
    ),
    "swin": (
        "swin.encoder.layers.{0,1}.blocks.{0,1}."
        "{attention.self.{query,key,value},{attention.output,intermediate,output}.dense}.weight",
        "swin.encoder.layers.0.downsample.reduction.weight",
    ),
    "convnext": ("convnext.encoder.stages.{0,1}.layers.{0,1}.{pwconv1,pwconv2}.weight",),
    "siglip": (f"vision_model.{_TOWER}", f"text_model.{_TOWER}"),
    "whisper": _SPEECH,
    "bart": _SPEECH,
    "t5": (
        "{encoder,decoder}.block.{0,1}.layer.0.SelfAttention.{q,k,v,o}.weight",
        "decoder.block.{0,1}.layer.1.EncDecAttention.{q,k,v,o}.weight",
        "{encoder.block.{0,1}.layer.1,decoder.block.{0,1}.layer.2}.DenseReluDense.{wi_0,wi_1,wo}.weight",
    ),
    "t5_relu": (
        "{encoder,decoder}.block.{0,1}.layer.0.SelfAttention.{q,k,v,o}.weight",
        "decoder.block.{0,1}.layer.1.EncDecAttention.{q,k,v,o}.weight",
        "{encoder.block.{0,1}.layer.1,decoder.block.{0,1}.layer.2}.DenseReluDense.{wi,wo}.weight",
    ),
    "llava": (f"language_model.model.{_LLAMA}",),
    "clip": ("vision_model.encoder.layers.{0,1}.{self_attn.{q,k,v,out}_proj,mlp.fc1}.weight",),
    "timm": ("blocks.{0,1}.{attn.{qkv,proj},mlp.{fc1,fc2}}.weight",),
}
# Families whose layers, or whose experts, lie in the file as [d_in, d_out].
CONV1D = ("gpt2", "gpt2_model")
TURNED_EXPERTS = {("gpt_oss", "4.57"), ("gpt_oss", "5"), ("llama4", "4.57"), ("llama4", "5"), ("qwen3_vl_moe", "4.57")}


class Entry(NamedTuple):
    """One family as one series of its library writes it."""

    family: str
    series: str

    @property
    def config(self):
        """The folder's config.json."""
        return FAMILIES[self.family][self.series]["config"]

    @property
    def shapes(self):
        """Shape of every stored tensor."""
        return {name: tuple(shape) for name, (_, shape) in FAMILIES[self.family][self.series]["tensors"].items()}

    @property
    def layers(self):
        """Names of the layers, an expert's as `NAME[i]`."""
        return [name for pattern in LAYERS[self.family] for name in braces(pattern)]

    def is_turned(self, layer):
        """Whether the file holds this layer as [d_in, d_out]."""
        return self.family in CONV1D or (layer.endswith("]") and self in TURNED_EXPERTS)

    def matrix(self, tensors, layer):
        """A layer [d_out, d_in] of stored tensors, float64."""
        name, _, index = layer.removesuffix("]").partition("[")
        found = np.asarray(tensors[name], np.float64)
        found = found[int(index)] if index else found
        return found.T if self.is_turned(layer) else found

    def stored(self):
        """A model: weights of order one, in the types that were recorded."""
        rng = np.random.default_rng(0)
        tensors = {}
        for name, (dtype, shape) in FAMILIES[self.family][self.series]["tensors"].items():
            whole = dtype.startswith(("I", "U"))
            x = np.arange(np.prod(shape)).reshape(shape) if whole else rng.standard_normal(shape)
            tensors[name] = np.asarray(x, {"F32": np.float32, "I64": np.int64}[dtype])
        return tensors


ENTRIES = [Entry(family, series) for family in sorted(FAMILIES) for series in sorted(FAMILIES[family])]
# Those that differ in what a merge sees: names and shapes.
LAYOUTS = list({json.dumps([e.family, e.shapes], sort_keys=True): e for e in ENTRIES}.values())


def label(entry):
    """Of a test."""
    return f"{entry.family}-{entry.series}"


def braces(pattern):
    """All names of a pattern: `{a,b}` stands for a and for b, also within braces.

    >>> braces("h.{0,1}.{q,mlp.{in,out}}")
    ['h.0.mlp.in', 'h.0.mlp.out', 'h.0.q', 'h.1.mlp.in', 'h.1.mlp.out', 'h.1.q']
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    names = itertools.chain.from_iterable(braces(f"{head}{part}{tail}") for part in found[1].split(","))
    return sorted(dict.fromkeys(names))


def fine_tuned(base, seed, scale=SCALE):
    """A model near `base`: each matrix moves by one of falling spectrum, so that no rank cuts between near-equals."""
    rng = np.random.default_rng(seed)
    return {
        name: x if x.dtype.kind in "iu" else np.asarray(x + scale * update(rng, x.shape), x.dtype)
        for name, x in base.items()
    }


def update(rng, shape):
    """An update of order one; matrices (along the last two axes) have singular values that fall by 0.7."""
    if len(shape) < 2:
        return rng.standard_normal(shape)
    *lead, m, n = shape
    rank = min(m, n)
    left, right = rng.standard_normal((*lead, m, rank)), rng.standard_normal((*lead, rank, n))
    return left * 0.7 ** np.arange(rank) @ right


def write(folder, tensors, config, *, shards=1):
    """A model folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return write_weights(folder, tensors, shards=shards)


def write_trio(folder, base, config, tasks=None, **how):
    """A base and two models fine-tuned from it; returns their tensors."""
    tasks = [fine_tuned(base, seed) for seed in (1, 2)] if tasks is None else tasks
    for name, tensors in zip(("base", "t1", "t2"), (base, *tasks), strict=True):
        write(folder / name, tensors, config, **how)
    return base, *tasks


def merge_command(folder, *options, out="out", base="base", tasks=("t1", "t2")):
    """The arguments of a merge of folders side by side."""
    given = [part for name in tasks for part in ("--task", f"{name}={folder / name}")]
    return ["merge", "--base", str(folder / base), *given, "--out", str(folder / out), *options]


def weights(folder):
    """All tensors of a folder, and of which shape, type and file they are."""
    tensors, layout = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        tensors |= part
        layout |= {name: (path.name, x.shape, x.dtype) for name, x in part.items()}
    return tensors, layout


def same_bits(a, b):
    """Whether two arrays are one and the same."""
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
