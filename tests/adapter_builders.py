"""PEFT folders, written with the libraries of the formats and none of the package's code."""

import json

import model_builders as build
import numpy as np
from safetensors.numpy import save_file

PREFIX = "base_model.model."
MODULES = tuple(name.removesuffix(".weight") for name in build.SELECTED)


def factors(base, seed, rank=2, modules=MODULES, scale=0.3):
    """Random A and B of some modules, by module."""
    rng = np.random.default_rng(seed)
    found = {}
    for module in modules:
        m, n = base[f"{module}.weight"].shape
        a = scale * rng.standard_normal((rank, n)).astype(np.float32)
        found[module] = a, scale * rng.standard_normal((m, rank)).astype(np.float32)
    return found


def config(rank, **fields):
    content = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"],
        "bias": "none",
        "fan_in_fan_out": False,
        "base_model_name_or_path": None,
        "task_type": "FEATURE_EXTRACTION",
        "lora_dropout": 0.1,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }
    return content | fields


def write(folder, pairs, *, rank=None, extra=None, prefix=PREFIX, infix="", dtype=np.float32, **fields):
    """A PEFT folder of the factors `{module: (A, B)}`, and of `extra` tensors by stored name."""
    rank = rank or next(iter(pairs.values()))[0].shape[0]
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"{prefix}{module}.lora_A{infix}.weight"] = a.astype(dtype)
        tensors[f"{prefix}{module}.lora_B{infix}.weight"] = b.astype(dtype)
    folder.mkdir(parents=True)
    save_file(tensors | (extra or {}), folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config(rank, **fields)))
    return folder


def merged(base, pairs, scale=2.0):
    """The whole model: W + s B A, in float64, kept in float32."""
    changed = {
        f"{module}.weight": base[f"{module}.weight"].astype(np.float64) + scale * (b.astype(np.float64) @ a)
        for module, (a, b) in pairs.items()
    }
    return base | {name: x.astype(np.float32) for name, x in changed.items()}
