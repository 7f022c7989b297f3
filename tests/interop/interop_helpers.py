"""Sizes of the tiny models and what both interop tests do with them."""

import json

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

import nufilt_jax as nj

# No two axes of a weight are alike where the architecture leaves a choice: a transposed matrix cannot hide.
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 20,
    "patch_size": 8,  # 2 by 2 whole patches; the rest is dropped
}
TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
}
PROJECTION = 10
RANKS = nj.NufiltConfig(filter_rank=6, adapter_rank=4, task_rank=3, steps=10)


def images(n=3, seed=0):
    side = VISION["image_size"]
    return np.random.default_rng(seed).standard_normal((n, 3, side, side)).astype(np.float32)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def our_features(folder, pixels):
    """Features by our reader and our forward pass."""
    return np.asarray(nj.models.clip_image_features(nj.load(str(folder)), jnp.asarray(pixels), config_of(folder)))


def merged(base, tasks):
    """NUFILT over folders; checks that it moved what it should, or nothing after it would mean much."""
    rule = nj.methods.get("nufilt", RANKS)
    start = nj.load(str(base))
    state = rule.init(start)
    for task in tasks:
        state = rule.update(state, nj.load(str(task)))
    moved = {name for name, value in state.merged.items() if not np.array_equal(value, start[name])}
    assert moved == set(state.delta)
    return state.merged


def perturbed(rng, value):
    """A weight of order one, or a step of fine-tuning away from it."""
    return np.asarray(value + 0.3 * rng.standard_normal(value.shape), value.dtype)


def assert_close(actual, wanted):
    # float32 over two layers of sums of 24 to 192 terms; outputs are of order one
    np.testing.assert_allclose(actual, wanted, atol=1e-5, rtol=1e-5)


def stored(folder):
    """Name, type and shape of every tensor in every safetensors file of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            found[path.name] = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    return found
