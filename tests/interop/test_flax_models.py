"""Our forward pass of CLIP's text tower against transformers' Flax classes (4.57 has the last ones)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from interop_helpers import PROJECTION, TEXT, VISION, config_of, perturbed
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    FlaxCLIPModel,
    FlaxCLIPTextModel,
    FlaxCLIPTextModelWithProjection,
)

import nufilt_jax as nj

EOS = TEXT["vocab_size"] - 3


def make(kind, text):
    """A model whose every parameter, biases and norms too, is drawn."""
    if kind is FlaxCLIPModel:
        model = FlaxCLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=PROJECTION), seed=0)
    else:
        model = kind(CLIPTextConfig(**text, projection_dim=PROJECTION), seed=0)
    rng = np.random.default_rng(0)
    model.params = jax.tree.map(lambda value: jnp.asarray(perturbed(rng, np.asarray(value))), model.params)
    return model


@pytest.mark.parametrize("eos", [EOS, 2])
@pytest.mark.parametrize(
    "kind", [FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection, FlaxCLIPModel], ids=lambda kind: kind.__name__
)
def test_clip_text_features(kind, eos, tmp_path):
    model = make(kind, TEXT | {"eos_token_id": eos, "num_hidden_layers": 2})
    model.save_pretrained(tmp_path / "m")
    ids = np.random.default_rng(0).integers(2, EOS, (3, 8)).astype(np.int32)
    ids[:, 6], ids[1, 2], ids[2, 4] = EOS, EOS, EOS + 2  # twice in one text, once after a higher token
    mask = np.ones_like(ids)
    mask[0, 7] = mask[2, 1] = 0
    if kind is FlaxCLIPModel:
        wanted = model.get_text_features(ids, mask)
    elif kind is FlaxCLIPTextModelWithProjection:
        wanted = model(ids, mask).text_embeds
    else:
        wanted = model(ids, mask).pooler_output
    folder = tmp_path / "m"
    params, config = nj.load(str(folder)), config_of(folder)
    found = nj.models.clip_text_features(params, jnp.asarray(ids), jnp.asarray(mask), config)
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)


def test_the_parameter_tree_is_theirs():
    model = make(FlaxCLIPTextModelWithProjection, TEXT)
    config = model.config.to_dict()
    tree = nj.models.to_text_tree(nj.from_flax(model.params, model.config), nj.models.parse_text_config(config))
    assert flatten_dict(tree).keys() == flatten_dict(model.params).keys()
    jax.tree.map(np.testing.assert_array_equal, tree, dict(model.params))
