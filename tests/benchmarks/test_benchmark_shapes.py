"""The layers are those of the models, and the synthetic weights have the spectrum they are said to have."""

import math

import numpy as np
import pytest

from benchmarks.common import shapes
from nufilt_jax.methods.selection import select

# Numbers in the selected layers: blocks x (attention matrices + feed-forward matrices).
PARAMETERS = {
    "vit-b32": 12 * (4 * 768 * 768 + 768 * 3072),
    "vit-b16": 12 * (4 * 768 * 768 + 768 * 3072),
    "vit-l14": 24 * (4 * 1024 * 1024 + 1024 * 4096),
    "flan-t5-base": 12 * (4 * 768 * 768 + 3 * 768 * 2048) + 12 * (8 * 768 * 768 + 3 * 768 * 2048),
    "llava-1.5-7b": 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008),
}


@pytest.mark.parametrize("model", shapes.MODELS)
def test_every_selected_parameter_is_there(model):
    layers = shapes.layer_shapes(model)
    assert sum(math.prod(shape) for shape in layers.values()) == PARAMETERS[model]


@pytest.mark.parametrize("model", shapes.MODELS)
def test_names_are_those_that_the_package_selects(model):
    layers = shapes.layer_shapes(model)
    weights = {name: np.broadcast_to(np.float32(0), shape) for name, shape in layers.items()}
    assert set(select(weights).layers) == set(layers)


def test_counts_by_shape():
    assert shapes.shape_counts(shapes.layer_shapes("vit-b32").values()) == {"768x768": 48, "3072x768": 12}
    assert shapes.shape_counts(shapes.layer_shapes("llava-1.5-7b", 2).values()) == {
        "4096x4096": 8,
        "4096x11008": 2,
        "11008x4096": 4,
    }


def test_blocks_are_limited_in_each_tower():
    assert len(shapes.layer_shapes("flan-t5-base", 1)) == 7 + 11
    assert shapes.layer_shapes("vit-b32", 99) == shapes.layer_shapes("vit-b32")


@pytest.mark.parametrize("shape", [(48, 30), (30, 48), (30, 30), (1, 5)], ids=str)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_spectrum_and_directions(shape, alpha):
    x, vectors = shapes.power_law(shape, seed=(1, 2), alpha=alpha, vectors=5)
    size = min(shape)
    wanted = np.arange(1.0, size + 1) ** -alpha
    assert x.dtype == np.float32
    np.testing.assert_allclose(np.linalg.svd(x.astype(float), compute_uv=False), wanted, atol=1e-6)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(5), atol=1e-12)
    responses = np.linalg.norm(x @ vectors, axis=0)
    np.testing.assert_allclose(responses, np.append(wanted, np.zeros(5))[:5], atol=1e-6)


def test_entries_are_spread_out_and_of_the_stated_size():
    x = shapes.task_vector("layer", (96, 64), task=0)
    assert np.std(x) == pytest.approx(shapes.ENTRY_STD, rel=0.02)
    assert np.max(np.abs(x)) < 8 * shapes.ENTRY_STD


def test_every_layer_and_task_has_weights_of_its_own():
    a, b, c = (shapes.task_vector(name, (16, 16), task=task) for name, task in (("a", 0), ("b", 0), ("a", 1)))
    assert not np.allclose(a, b) and not np.allclose(a, c)
    np.testing.assert_array_equal(a, shapes.task_vector("a", (16, 16), task=0))


def test_inputs_have_starts_by_name():
    layers = {"b": (6, 8), "a": (8, 8)}
    inputs, alone = shapes.inputs(layers, 3), shapes.inputs({"a": (8, 8)}, 3)
    assert {name: x.shape for name, x in inputs.start.items()} == {"b": (3, 8), "a": (3, 8)}
    for whole, part in zip(inputs, alone, strict=True):
        np.testing.assert_array_equal(whole["a"], part["a"])
