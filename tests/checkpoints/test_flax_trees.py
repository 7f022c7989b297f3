import types

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_builders import bits_equal, flax_vision_tree, t5_model, vision_tower
from flax.core import freeze
from flax.traverse_util import flatten_dict

from nufilt_jax.checkpoints import from_flax, to_flax
from nufilt_jax.errors import CheckpointError

CLIP = {"model_type": "clip_vision_model"}


@pytest.mark.parametrize(
    "form",
    [
        lambda tree: tree,
        freeze,
        flatten_dict,
        lambda tree: flatten_dict(tree, sep="/"),
        lambda tree: {"params": tree},
    ],
    ids=["nested", "frozen", "tuples", "slashes", "variables"],
)
def test_every_form_of_a_tree_is_read(form):
    tensors = vision_tower()
    read = from_flax(form(flax_vision_tree(tensors)), types.SimpleNamespace(to_dict=lambda: CLIP))
    assert read.keys() == tensors.keys()
    assert all(bits_equal(np.ascontiguousarray(read[name]), tensors[name]) for name in tensors)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("model", [(vision_tower, CLIP), (t5_model, {"model_type": "t5"})], ids=["clip", "t5"])
def test_there_and_back(model, array):
    make, config = model
    tensors = {name: array(value) for name, value in make().items()}
    back = from_flax(to_flax(tensors, config), config)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert isinstance(back[name], type(value))
        np.testing.assert_array_equal(back[name], value)


def test_trees_are_those_of_hugging_face():
    tree = flatten_dict(to_flax(vision_tower(), CLIP))
    expected = flatten_dict(flax_vision_tree(vision_tower()))
    assert tree.keys() == expected.keys()
    assert all(np.array_equal(tree[path], expected[path]) for path in tree)


@pytest.mark.parametrize("convert", [from_flax, to_flax])
@pytest.mark.parametrize("config", [{}, {"model_type": "bert"}])
def test_unknown_models_are_refused(convert, config):
    with pytest.raises(CheckpointError, match="has no Flax names known here"):
        convert({}, config)
