"""Small sound models, for harnesses to damage and to merge."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax.serialization import msgpack_serialize
from safetensors.numpy import save_file

Tensors = dict[str, Any]


def base_and_task(size: int = 8, n_layers: int = 2, seed: int = 0) -> tuple[Tensors, Tensors]:
    """The weights of a Llama of square matrices, and of a fine-tune of it."""
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in _shapes(size, n_layers).items()}
    rng = np.random.default_rng(seed + 1)
    return base, {
        name: x + np.float32(0.01) * rng.standard_normal(x.shape).astype(np.float32) for name, x in base.items()
    }


def _shapes(size: int, n_layers: int) -> dict[str, tuple[int, ...]]:
    stems = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(n_layers) for part in "qkvo"]
    shapes: dict[str, tuple[int, ...]] = {f"{stem}.weight": (size, size) for stem in stems}
    return {**shapes, "model.norm.weight": (size,), "lm_head.weight": (12, size)}


def _beside(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32"}))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def write(folder: Path, tensors: Tensors, shards: int = 1) -> None:
    """A model folder with safetensors weights."""
    _beside(folder)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[index::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_flax(folder: Path, tensors: Tensors) -> None:
    """A model folder with Flax weights."""
    _beside(folder)
    tree: dict[str, Any] = {}
    for name, x in tensors.items():
        *modules, leaf = name.split(".")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node["kernel" if x.ndim == 2 else leaf] = np.ascontiguousarray(x.T)
    (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))


def write_lora(folder: Path, size: int = 8) -> None:
    """An adapter as PEFT writes it."""
    rng = np.random.default_rng(2)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    factors = {f"{stem}_A.weight": (2, size), f"{stem}_B.weight": (size, 2)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in factors.items()}
    save_file(arrays, folder / "adapter_model.safetensors", {"format": "pt"})


def write_unsafe(folder: Path, tensors: Tensors | None = None) -> None:
    """A model with code of its own and weights in pickle; with tensors, these as safetensors beside."""
    if tensors is None:
        _beside(folder)
    else:
        write(folder, tensors)
    config = {"model_type": "llama", "dtype": "float32", "auto_map": {"AutoModel": "modeling_x.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_x.py").write_text("class Model:\n    pass\n")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}.")
