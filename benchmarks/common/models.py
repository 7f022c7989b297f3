"""Synthetic models of true sizes, as folders that the package merges: random weights, power-law task vectors.

python -m benchmarks.common.models FOLDER KIND SIZES N_TASKS    writes those that are missing; the scripts call it so
"""

import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from benchmarks.common import records, script, shapes
from nufilt_jax.checkpoints.safetensors_files import Piece, write_file

WEIGHTS, SIZES = "model.safetensors", "sizes.json"
STORED = {"float32": ("F32", np.dtype(np.float32)), "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16))}


class Tower(NamedTuple):
    """Size of a CLIP vision tower, and the type that its weights are stored in; ViT-B/32's."""

    width: int = 768
    blocks: int = 12
    patch: int = 32
    dtype: str = "float32"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name, as transformers 4 names them."""
        width, inner, embeddings = self.width, 4 * self.width, "vision_model.embeddings."
        found: dict[str, tuple[int, ...]] = {
            embeddings + "class_embedding": (width,),
            embeddings + "patch_embedding.weight": (width, 3, self.patch, self.patch),
            embeddings + "position_embedding.weight": ((224 // self.patch) ** 2 + 1, width),
        }
        linear = {f"self_attn.{part}_proj": (width, width) for part in "qkv"} | {
            "self_attn.out_proj": (width, width),
            "mlp.fc1": (inner, width),
            "mlp.fc2": (width, inner),
        }
        norms = [f"vision_model.{name}" for name in ("pre_layrnorm", "post_layernorm")]
        for block in range(self.blocks):
            prefix = f"vision_model.encoder.layers.{block}."
            found |= {f"{prefix}{name}.weight": shape for name, shape in linear.items()}
            found |= {f"{prefix}{name}.bias": shape[:1] for name, shape in linear.items()}
            norms += [f"{prefix}layer_norm{number}" for number in (1, 2)]
        return found | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}

    @property
    def n_bytes(self) -> int:
        """Of the model in float32, in which it is merged."""
        return 4 * n_parameters(self)

    def config(self) -> dict[str, Any]:
        """Content of `config.json`."""
        return {
            "model_type": "clip_vision_model",
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": max(1, self.width // 64),
            "patch_size": self.patch,
            "image_size": 224,
            "torch_dtype": self.dtype,
        }


class Llama(NamedTuple):
    """Size of a language model, and the type that its weights are stored in."""

    width: int = 1024
    inner: int = 2816
    blocks: int = 8
    vocabulary: int = 8192
    dtype: str = "bfloat16"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name, as transformers names them."""
        width, inner = self.width, self.inner
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, width)}
        for block in range(self.blocks):
            stem = f"model.layers.{block}."
            found |= {f"{stem}self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
            found |= {f"{stem}mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
            found |= {f"{stem}mlp.down_proj.weight": (width, inner), f"{stem}input_layernorm.weight": (width,)}
        return found | {"model.norm.weight": (width,)}

    @property
    def n_bytes(self) -> int:
        """Of the model in float32, in which it is merged."""
        return 4 * n_parameters(self)

    def config(self) -> dict[str, Any]:
        """Content of `config.json`."""
        return {"model_type": "llama", "torch_dtype": self.dtype}


Model = Tower | Llama
KINDS: dict[str, type[Tower] | type[Llama]] = {"vit-b32": Tower, "llama": Llama}


def n_parameters(model: Model) -> int:
    """How many numbers a model has."""
    return sum(int(np.prod(shape)) for shape in model.shapes().values())


def about(model: Model) -> records.Json:
    """A model's sizes, as results files tell them."""
    return {"sizes": model._asdict(), "parameters": n_parameters(model), "float32_bytes": model.n_bytes}


def names(n_tasks: int) -> list[str]:
    """Folders of a base and of so many tasks."""
    return ["base", *(f"task{index:02}" for index in range(n_tasks))]


def write_models(folder: Path, model: Model, n_tasks: int) -> None:
    """A base and its tasks, those that are missing, as `names` calls them.

    They are written by a process of their own: on Linux a child's largest resident memory is at least what its parent
    ever had, and a parent that measures its children must stay small.

    Args:
      folder: keeps models of one size.
      model: its size.
      n_tasks: how many tasks.

    Raises:
      SystemExit: models of another size are there.
    """
    [kind] = [name for name, one in KINDS.items() if isinstance(model, one)]
    told, sizes = folder / SIZES, {"kind": kind, **model._asdict()}
    if folder.exists() and any(folder.iterdir()) and (not told.is_file() or json.loads(told.read_text()) != sizes):
        raise SystemExit(f"{folder} holds something else than models of {sizes}; choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    told.write_text(json.dumps(sizes))
    if _missing(folder, n_tasks):
        command = [sys.executable, "-m", "benchmarks.common.models", folder.absolute(), kind, json.dumps(model)]
        subprocess.run([*map(str, command), str(n_tasks)], cwd=records.ROOT, check=True)


def _missing(folder: Path, n_tasks: int) -> list[tuple[str, int | None]]:
    numbered = zip(names(n_tasks), [None, *range(n_tasks)], strict=True)
    return [(name, task) for name, task in numbered if not (folder / name / WEIGHTS).exists()]


def write_model(folder: Path, model: Model, task: int | None) -> None:
    """A model folder: the base, or the base plus a task vector. One tensor at a time is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config()))
    name, dtype = STORED[model.dtype]
    pieces = [Piece(key, name, shape, _content(key, shape, task, dtype)) for key, shape in model.shapes().items()]
    write_file(folder / f"{WEIGHTS}.part", pieces, {"format": "pt"})
    (folder / f"{WEIGHTS}.part").rename(folder / WEIGHTS)


def _content(name: str, shape: tuple[int, ...], task: int | None, dtype: np.dtype) -> Iterator[memoryview]:
    tensor = pretrained(name, shape)
    if task is not None:
        tensor += task_vector(name, shape, task)
    yield tensor.astype(dtype, copy=False).reshape(-1).view(np.uint8).data


def pretrained(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the base, float32."""
    return 0.02 * np.random.default_rng(list(name.encode())).standard_normal(shape, np.float32)


def task_vector(name: str, shape: tuple[int, ...], task: int) -> np.ndarray:
    """What a task adds to it, float32."""
    rng = np.random.default_rng([task, *name.encode()])
    return _moved(shape, rng) if len(shape) == 2 else 1e-4 * rng.standard_normal(shape, np.float32)


@functools.cache
def _spectrum(shape: tuple[int, int]) -> np.ndarray:
    return shapes.task_vector("any", shape, task=0)


def _moved(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A task vector: one matrix per shape, its rows and columns in an order and with signs of their own."""
    order = [rng.permutation(size) for size in shape]
    signs = [rng.choice(np.array([-1, 1], np.float32), size) for size in shape]
    return _spectrum((shape[0], shape[1]))[np.ix_(*order)] * signs[0][:, None] * signs[1]


def main() -> None:
    """Writes what is missing of a folder of models."""
    folder, kind, sizes, n_tasks = sys.argv[1:]
    for name, task in _missing(Path(folder), int(n_tasks)):
        script.say(f"writing {name}")
        write_model(Path(folder, name), KINDS[kind](*json.loads(sizes)), task)


if __name__ == "__main__":
    main()
