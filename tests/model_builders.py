"""Tiny checkpoints of a CLIP vision tower with two layers, written with the libraries of the formats alone."""

import json

import ml_dtypes
import numpy as np
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

WIDTH, HIDDEN, LAYERS = 16, 24, 2
Q0 = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
FC1 = "vision_model.encoder.layers.1.mlp.fc1.weight"
FC2 = "vision_model.encoder.layers.1.mlp.fc2.weight"
SELECTED = tuple(
    f"vision_model.encoder.layers.{layer}.{name}.weight"
    for layer in range(LAYERS)
    for name in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
)
RANKS = ("--filter-rank", "4", "--adapter-rank", "2", "--task-rank", "2", "--steps", "4")
TASKS = ("alpha", "beta", "gamma", "delta")


def shapes():
    """Every tensor of the tower with its shape."""
    result = {
        "vision_model.embeddings.class_embedding": (WIDTH,),
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, 2, 2),
        "vision_model.embeddings.position_embedding.weight": (5, WIDTH),
        "vision_model.pre_layrnorm.weight": (WIDTH,),
        "vision_model.post_layernorm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        stem = f"vision_model.encoder.layers.{layer}."
        for name in "qkv":
            result[f"{stem}self_attn.{name}_proj.weight"] = (WIDTH, WIDTH)
        result[f"{stem}self_attn.out_proj.weight"] = (WIDTH, WIDTH)
        result[f"{stem}self_attn.out_proj.bias"] = (WIDTH,)
        result[f"{stem}mlp.fc1.weight"] = (HIDDEN, WIDTH)
        result[f"{stem}mlp.fc2.weight"] = (WIDTH, HIDDEN)
    return result


def tower(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes().items()}


def fine_tuned(base, seed, scale=0.05):
    """A model near `base`: what fine-tuning gives."""
    rng = np.random.default_rng(seed)
    return {
        name: (x.astype(np.float32) + scale * rng.standard_normal(x.shape)).astype(np.float32)
        for name, x in base.items()
    }


def text_side(seed=99):
    """What a whole CLIPModel has beside the vision tower."""
    rng = np.random.default_rng(seed)
    return {
        "text_model.encoder.layers.0.self_attn.q_proj.weight": rng.standard_normal((8, 8)).astype(np.float32),
        "text_model.embeddings.position_ids": np.arange(7, dtype=np.int64)[None],
        "visual_projection.weight": rng.standard_normal((8, WIDTH)).astype(np.float32),
        "logit_scale": np.asarray(2.5, np.float32),
    }


def as_bfloat16(tensors):
    return {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}


def write(folder, tensors, *, shards=1, **config):
    """A model folder with safetensors weights, a config and side-car files."""
    write_beside(folder, **config)
    return write_weights(folder, tensors, shards=shards)


def write_weights(folder, tensors, *, shards=1):
    """The safetensors weights of a model folder; returns the folder."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[index::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_flax(folder, tensors):
    """The same tower as HF Flax writes it: kernels are transposed, scales and embeddings have names of their own."""
    write_beside(folder)
    flat = {}
    for name, x in tensors.items():
        path = name.replace(".", "/")
        if "norm" in name:
            path = path.replace("/weight", "/scale")
        elif "position_embedding" in name:
            path = path.replace("/weight", "/embedding")
        elif name.endswith(".weight"):
            path = path.replace("/weight", "/kernel")
            x = x.T if x.ndim == 2 else x.transpose(2, 3, 1, 0)
        flat[path] = np.ascontiguousarray(x)
    (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(unflatten_dict(flat, sep="/")))
    return folder


def write_beside(folder, **config):
    folder.mkdir(parents=True)
    content = {"model_type": "clip_vision_model", "torch_dtype": "float32", "hidden_size": WIDTH} | config
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "preprocessor_config.json").write_text('{"size": 4}')
    (folder / "README.md").write_text("# the base's own card\n")


def weights(folder):
    """All tensors of a folder's safetensors files, by stored name."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def weight_bytes(folder):
    """The weight files themselves."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".msgpack")}


def snapshot(folder):
    """Every path below a folder, with the bytes and times of files: whether anything was written."""
    return {
        p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, p.read_bytes()) if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
