"""True shapes of the models' selected layers, and synthetic weights of these shapes.

The weights stand for task vectors: singular values fall by a power law, σ_k ∝ k^-alpha, between random orthogonal
factors. These are products of sign flips and cosine transforms: exactly orthogonal, so that the spectrum is what was
asked for to float32 rounding, and applied to a whole matrix in m n log(m n) operations, where QR would take minutes.
"""

import itertools
import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy import fft  # jax depends on scipy

from nufilt_jax.core.adapt import normal_start
from nufilt_jax.methods.stacked import Group, group_layers
from nufilt_jax.methods.starts import adapter_keys

Shape = tuple[int, int]

ENTRY_STD = 1e-3  # of a task vector's entries, about what fine-tuning of CLIP leaves
ALPHA = 0.6  # decay of the spectrum
MIXES = 2  # rounds of sign flips and cosine transforms in one orthogonal factor


class Tower(NamedTuple):
    """Equal blocks one after another.

    Attributes:
      prefix: of the tensors' names, with a place for the block's number.
      blocks: how many.
      layers: shape [m, n] of each selected layer of a block, by the rest of its name.
    """

    prefix: str
    blocks: int
    layers: Mapping[str, Shape]


def _named(form: str, names: str, shape: Shape) -> dict[str, Shape]:
    return {form.format(name): shape for name in names.split()}


def _clip(blocks: int, width: int) -> tuple[Tower, ...]:
    layers = _named("self_attn.{}_proj.weight", "q k v out", (width, width)) | {"mlp.fc1.weight": (4 * width, width)}
    return (Tower("vision_model.encoder.layers.{}.", blocks, layers),)


def _t5(blocks: int, width: int, inner: int) -> tuple[Tower, ...]:
    def tower(side: str, attentions: tuple[str, ...]) -> Tower:
        forms = [f"{i}.{name}.{{}}.weight" for i, name in enumerate(attentions)]
        dense = f"{len(attentions)}.DenseReluDense.{{}}.weight"
        parts = [_named(form, "q k v o", (width, width)) for form in forms]
        parts += [_named(dense, "wi_0 wi_1", (inner, width)), _named(dense, "wo", (width, inner))]
        return Tower(f"{side}.block.{{}}.layer.", blocks, {k: v for part in parts for k, v in part.items()})

    return tower("encoder", ("SelfAttention",)), tower("decoder", ("SelfAttention", "EncDecAttention"))


def _llama(blocks: int, width: int, inner: int) -> tuple[Tower, ...]:
    layers = (
        _named("self_attn.{}_proj.weight", "q k v o", (width, width))
        | _named("mlp.{}_proj.weight", "gate up", (inner, width))
        | _named("mlp.{}_proj.weight", "down", (width, inner))
    )
    return (Tower("language_model.model.layers.{}.", blocks, layers),)


MODELS: dict[str, tuple[Tower, ...]] = {
    "vit-b32": _clip(12, 768),
    "vit-b16": _clip(12, 768),
    "vit-l14": _clip(24, 1024),
    "flan-t5-base": _t5(12, 768, 2048),
    "llava-1.5-7b": _llama(32, 4096, 11008),
}


def layer_shapes(model: str, blocks: int | None = None) -> dict[str, Shape]:
    """Shape [m, n] of every selected layer by its canonical name; of the first `blocks` blocks of each tower alone."""
    return {
        tower.prefix.format(block) + name: shape
        for tower in MODELS[model]
        for block in range(min(tower.blocks, tower.blocks if blocks is None else blocks))
        for name, shape in tower.layers.items()
    }


def shape_counts(shapes: Iterable[Shape]) -> dict[str, int]:
    """How many layers there are of each shape, as `{"3072x768": 12}`."""
    return {f"{m}x{n}": len(list(group)) for (m, n), group in itertools.groupby(sorted(shapes))}


def task_vector(name: str, shape: Shape, *, task: int, alpha: float = ALPHA) -> np.ndarray:
    """Synthetic task vector of one layer, float32: entries of standard deviation `ENTRY_STD`.

    Args:
      name: of the layer; it and `task` are the seed.
      shape: [m, n].
      task: number of the task. D of a solve is task 0's.
      alpha: decay of the spectrum.
    """
    m, n = shape
    matrix, _ = power_law(shape, seed=(task, zlib.crc32(name.encode())), alpha=alpha)
    return matrix * np.float32(ENTRY_STD * np.sqrt(m * n) / np.linalg.norm(matrix))


def power_law(
    shape: Shape, *, seed: tuple[int, ...], alpha: float = ALPHA, vectors: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A float32 matrix with singular values σ_k = k^-alpha.

    Args:
      shape: [m, n].
      seed: of the factors.
      alpha: decay of the spectrum.
      vectors: how many of the leading right singular vectors to return beside it, float64 [n, vectors].
    """
    rng = np.random.default_rng(seed)
    signs = [rng.choice(np.array([-1, 1]), size=(MIXES, size)) for size in shape]
    size = min(shape)
    matrix = np.zeros(shape, np.float32)
    matrix[np.arange(size), np.arange(size)] = np.arange(1.0, size + 1) ** -alpha
    matrix = _mix(_mix(matrix, signs[0]).T, signs[1]).T
    return np.ascontiguousarray(matrix), _mix(np.eye(shape[1], vectors), signs[1])


def _mix(x: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Multiplies from the left by an orthogonal matrix that `signs` determine; in the dtype of `x`."""
    for flips in signs:
        x = np.asarray(fft.dct(x * flips[:, None].astype(x.dtype), axis=0, norm="ortho"))
    return x


def grouped(shapes: Mapping[str, Shape]) -> tuple[Group, ...]:
    """The groups and stacks in which the package solves these layers."""
    return group_layers(shapes)


def stacked(group: Group, params: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """The group's matrices, a stack per shape."""
    return tuple(np.stack([params[name] for name in names]) for names in group.stacks)


class Inputs(NamedTuple):
    """One task's solve, the same arrays for every contender; each by layer name, float32.

    Attributes:
      merged: D.
      task: τ.
      start: A's start.
    """

    merged: dict[str, np.ndarray]
    task: dict[str, np.ndarray]
    start: dict[str, np.ndarray]


def inputs(
    shapes: Mapping[str, Shape],
    rank: int,
    *,
    task: int = 1,
    alpha: float = ALPHA,
    merged: dict[str, np.ndarray] | None = None,
) -> Inputs:
    """Synthetic D and τ of all layers, and A's starts of rank `rank` as a merge draws them (seed 0).

    Args:
      shapes: [m, n] by layer name.
      rank: r_l.
      task: number of the new task.
      alpha: decay of both spectra.
      merged: D, if it is there already; else it is task 0's vector.
    """
    if merged is None:
        merged = {name: task_vector(name, shape, task=0, alpha=alpha) for name, shape in shapes.items()}
    new = {name: task_vector(name, shape, task=task, alpha=alpha) for name, shape in shapes.items()}
    keys = dict(zip(shapes, adapter_keys(0, task + 1, tuple(shapes)), strict=True))
    start = {name: np.asarray(normal_start(jnp.asarray(keys[name]), rank, shape[1])) for name, shape in shapes.items()}
    return Inputs(merged, new, start)
