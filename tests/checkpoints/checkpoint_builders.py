"""Tiny checkpoints, written with the libraries of the formats and none of the package's code."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

WIDTH, HIDDEN, PATCH = 4, 6, 2
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def _random(rng, shape, dtype):
    return rng.standard_normal(shape).astype(DTYPES[dtype])


def vision_tower(seed=0, dtype="float32", prefix="vision_model."):
    """A CLIP vision tower of one layer, in torch names; an integer buffer as 4.30 and before wrote it."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embeddings.class_embedding": (WIDTH,),
        "embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        "embeddings.position_embedding.weight": (5, WIDTH),
        "pre_layrnorm.weight": (WIDTH,),
        "pre_layrnorm.bias": (WIDTH,),
        "encoder.layers.0.self_attn.q_proj.weight": (WIDTH, WIDTH),
        "encoder.layers.0.self_attn.q_proj.bias": (WIDTH,),
        "encoder.layers.0.mlp.fc1.weight": (HIDDEN, WIDTH),
        "encoder.layers.0.mlp.fc2.weight": (WIDTH, HIDDEN),
        "post_layernorm.weight": (WIDTH,),
    }
    return {prefix + name: _random(rng, shape, dtype) for name, shape in shapes.items()}


def clip_model(seed=0, dtype="float32"):
    """A whole CLIPModel: both towers, projections, a scalar and an integer buffer."""
    rng = np.random.default_rng(seed + 1)
    return vision_tower(seed, dtype) | {
        "text_model.embeddings.token_embedding.weight": _random(rng, (7, WIDTH), dtype),
        "text_model.encoder.layers.0.mlp.fc1.weight": _random(rng, (HIDDEN, WIDTH), dtype),
        "text_model.encoder.layers.0.mlp.fc2.weight": _random(rng, (WIDTH, HIDDEN), dtype),
        "text_model.encoder.layers.0.layer_norm1.weight": _random(rng, (WIDTH,), dtype),
        "text_model.embeddings.position_ids": np.arange(7, dtype=np.int64)[None],
        "text_projection.weight": _random(rng, (3, WIDTH), dtype),
        "visual_projection.weight": _random(rng, (3, WIDTH), dtype),
        "logit_scale": np.asarray(2.6592, DTYPES[dtype]),
    }


def t5_model(seed=0, tied_copies=(), head=True):
    """A T5 of one layer; `tied_copies` names further copies of the embedding to store."""
    rng = np.random.default_rng(seed)
    shared = _random(rng, (9, WIDTH), "float32")
    tensors = {
        "shared.weight": shared,
        "encoder.block.0.layer.0.SelfAttention.q.weight": _random(rng, (HIDDEN, WIDTH), "float32"),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": _random(rng, (8, 2), "float32"),
        "encoder.block.0.layer.0.layer_norm.weight": _random(rng, (WIDTH,), "float32"),
    }
    if head:
        tensors["lm_head.weight"] = _random(rng, (9, WIDTH), "float32")
    return tensors | {name: shared.copy() for name in tied_copies}


def flax_vision_tree(tensors):
    """A vision tower's torch tensors as FlaxCLIPVisionModel holds them, each name spelled out by hand."""
    layer = "vision_model.encoder.layers.0."
    flat = {
        "vision_model/embeddings/class_embedding": tensors["vision_model.embeddings.class_embedding"],
        "vision_model/embeddings/patch_embedding/kernel": np.einsum(
            "oihw->hwio", tensors["vision_model.embeddings.patch_embedding.weight"]
        ),
        "vision_model/embeddings/position_embedding/embedding": tensors[
            "vision_model.embeddings.position_embedding.weight"
        ],
        "vision_model/pre_layrnorm/scale": tensors["vision_model.pre_layrnorm.weight"],
        "vision_model/pre_layrnorm/bias": tensors["vision_model.pre_layrnorm.bias"],
        "vision_model/encoder/layers/0/self_attn/q_proj/kernel": tensors[layer + "self_attn.q_proj.weight"].T,
        "vision_model/encoder/layers/0/self_attn/q_proj/bias": tensors[layer + "self_attn.q_proj.bias"],
        "vision_model/encoder/layers/0/mlp/fc1/kernel": tensors[layer + "mlp.fc1.weight"].T,
        "vision_model/encoder/layers/0/mlp/fc2/kernel": tensors[layer + "mlp.fc2.weight"].T,
        "vision_model/post_layernorm/scale": tensors["vision_model.post_layernorm.weight"],
    }
    return unflatten_dict(flat, sep="/")


def write_config(folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_type": "clip_vision_model", "torch_dtype": "float32"} | config
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "tokenizer.json").write_text('{"not": "weights"}')


def write_safetensors(folder: Path, tensors, *, shards=1, metadata=None, **config):
    """A folder with `model.safetensors`, or with shards and an index."""
    write_config(folder, **config)
    metadata = {"format": "pt"} if metadata is None else metadata
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata)
        return folder
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[index::shards]}
        save_file(part, folder / file, metadata)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map, sum(value.nbytes for value in tensors.values()))
    return folder


def write_index(folder, weight_map, total_size=0, name="model.safetensors.index.json"):
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_flax(folder, tree, **config):
    write_config(folder, **config)
    (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    return folder


def bits_equal(a, b):
    """Same type, shape and bytes: NaN equals itself, -0 differs from 0."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def folder_bytes(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
