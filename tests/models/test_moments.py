"""Second moments of the layers' inputs against an independent forward pass in float64, token by token."""

import functools

import clip_reference
import jax
import numpy as np
import pytest

from nufilt_jax.errors import ConfigError
from nufilt_jax.evaluation import moments
from nufilt_jax.evaluation.moments import layer_input_moments, tower_layers
from nufilt_jax.models import canonical_shapes, clip_image_features, parse_vision_config

CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 5,
    "patch_size": 2,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
TOKENS = 5
BLOCK = "vision_model.encoder.layers."


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = canonical_shapes(parse_vision_config(CONFIG))
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def random_images(n=7, seed=1):
    return np.random.default_rng(seed).standard_normal((n, 3, 5, 5)).astype(np.float32)


def inputs_of(params, image):
    """What every linear layer is given, one row per token."""
    p = {name: np.asarray(x, np.float64) for name, x in params.items()}

    def norm(tokens, name):
        weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
        return np.stack([clip_reference.layer_norm(token, weight, bias, 1e-5) for token in tokens])

    found = {}
    hidden = norm(
        clip_reference.embed(image[:, :4, :4].astype(np.float64), p, CONFIG | {"image_size": 4}),
        "vision_model.pre_layrnorm",
    )
    for index in range(2):
        stem = f"{BLOCK}{index}"
        normed = norm(hidden, f"{stem}.layer_norm1")
        found |= {f"{stem}.self_attn.{name}_proj.weight": normed for name in "qkv"}
        no_output = p | {f"{stem}.self_attn.out_proj.weight": np.eye(8), f"{stem}.self_attn.out_proj.bias": np.zeros(8)}
        mixed = clip_reference.attention(normed, no_output, f"{stem}.self_attn", 2)
        found[f"{stem}.self_attn.out_proj.weight"] = mixed
        hidden = hidden + mixed @ p[f"{stem}.self_attn.out_proj.weight"].T + p[f"{stem}.self_attn.out_proj.bias"]
        normed = norm(hidden, f"{stem}.layer_norm2")
        found[f"{stem}.mlp.fc1.weight"] = normed
        inner = clip_reference.activate(
            normed @ p[f"{stem}.mlp.fc1.weight"].T + p[f"{stem}.mlp.fc1.bias"], "quick_gelu"
        )
        found[f"{stem}.mlp.fc2.weight"] = inner
        hidden = hidden + inner @ p[f"{stem}.mlp.fc2.weight"].T + p[f"{stem}.mlp.fc2.bias"]
    return found


def by_hand(params, images):
    second = {}
    for image in images:
        for name, rows in inputs_of(params, image).items():
            for row in rows:
                second[name] = second.get(name, 0) + np.outer(row, row)
    return second


@pytest.mark.parametrize("batch_size", [3, 64])
def test_moments_are_those_of_all_tokens(batch_size):
    """Whatever the batches: the images that fill the last one up count for nothing."""
    params, images = random_params(), random_images()
    wanted = by_hand(params, images)
    found = layer_input_moments(params, CONFIG, images, batch_size=batch_size)
    assert found.tokens == 7 * TOKENS
    assert list(found.second) == list(tower_layers(CONFIG)) and found.second.keys() == wanted.keys()
    for name, x in wanted.items():
        np.testing.assert_allclose(found.second[name], x, rtol=0, atol=1e-5 * np.trace(x), err_msg=name)


def test_bytes_are_normalised_first():
    raw = np.random.default_rng(0).integers(0, 256, (3, 3, 5, 5), dtype=np.uint8)
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)
    pixels = np.stack([(raw[:, i] / 255 - mean[i]) / std[i] for i in range(3)], axis=1).astype(np.float32)
    first = layer_input_moments(random_params(), CONFIG, raw, mean=mean, std=std, batch_size=3).second
    second = layer_input_moments(random_params(), CONFIG, pixels, batch_size=3).second
    for name, x in second.items():
        np.testing.assert_allclose(first[name], x, rtol=0, atol=1e-5 * np.trace(x))


def test_the_widths_of_the_layers():
    widths = tower_layers(CONFIG)
    assert len(widths) == 12
    assert {n for name, n in widths.items() if "fc2" in name} == {12}
    assert {n for name, n in widths.items() if "fc2" not in name} == {8}


def test_a_projection_is_no_layer_of_a_block():
    rng = np.random.default_rng(3)
    params = random_params() | {"visual_projection.weight": rng.normal(size=(4, 8)).astype(np.float32)}
    found = layer_input_moments(params, CONFIG, random_images(2), batch_size=3)
    assert found.second.keys() == tower_layers(CONFIG).keys()


def test_one_compilation_for_all_models_and_batches():
    moments._add_batch.clear_cache()
    for seed in range(2):
        layer_input_moments(random_params(seed), CONFIG, random_images(7), batch_size=3)
    assert moments._add_batch._cache_size() == 1


def test_recording_leaves_the_features_as_they_are():
    params, images = random_params(), random_images(3)
    features = functools.partial(clip_image_features, config=CONFIG)
    before = jax.jit(features)(params, images)
    layer_input_moments(params, CONFIG, images, batch_size=3)
    jax.clear_caches()  # traced anew, after a recorder has been there
    np.testing.assert_array_equal(before, jax.jit(features)(params, images))


def test_what_cannot_be_measured_is_refused():
    params = random_params()
    with pytest.raises(ConfigError, match="images: there are none"):
        layer_input_moments(params, CONFIG, random_images()[:0])
    mixed = params | {f"{BLOCK}0.mlp.fc1.experts.0.a": np.zeros((2, 8), np.float32)}
    with pytest.raises(ConfigError, match="layers of experts have no input of their own"):
        layer_input_moments(mixed, CONFIG, random_images())
