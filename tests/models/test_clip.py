import functools

import chex
import clip_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.extend.core import jaxprs_in_params

from nufilt_jax.errors import CheckpointError
from nufilt_jax.models import (
    ClipVisionModule,
    canonical_shapes,
    clip_image_features,
    parse_vision_config,
    to_flax_tree,
    vision_features,
)

CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 10,
    "patch_size": 4,  # 2 by 2 whole patches; two rows and columns of pixels are dropped
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
UNKNOWN = "no such tensor in the model that config.json describes"
DENSE = (
    "self_attn/q_proj",
    "self_attn/k_proj",
    "self_attn/v_proj",
    "self_attn/out_proj",
    "mlp/fc1",
    "mlp/fc2",
)


def random_params(config=CONFIG, seed=0, projection=None):
    rng = np.random.default_rng(seed)
    shapes = dict(canonical_shapes(parse_vision_config(config)))
    if projection:
        shapes["visual_projection.weight"] = (projection, config["hidden_size"])
    return {name: rng.normal(0.1, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


def random_images(n=3, side=10, seed=1):
    return np.random.default_rng(seed).standard_normal((n, 3, side, side)).astype(np.float32)


def expected(params, images, config=CONFIG):
    return np.stack([reference.image_features(params, image, config) for image in images])


def assert_close(actual, wanted):
    # float32 over some dozen sums of 4 to 48 terms; outputs are of order one
    np.testing.assert_allclose(actual, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("projection", [None, 7])
def test_forward_equals_reference(activation, projection):
    config = CONFIG | {"hidden_act": activation}
    params, images = random_params(projection=projection), random_images()
    features = clip_image_features(params, jnp.asarray(images), config)
    assert features.dtype == jnp.float32
    assert features.shape == (3, projection or 12)
    assert_close(features, expected(params, images, config))


def test_activations_differ():
    params, images = random_params(), jnp.asarray(random_images())
    quick, exact = (clip_image_features(params, images, CONFIG | {"hidden_act": a}) for a in ("quick_gelu", "gelu"))
    assert np.abs(quick - exact).max() > 1e-3


def test_layer_norm_eps_comes_from_the_config():
    config = CONFIG | {"layer_norm_eps": 0.1}
    params, images = random_params(), random_images()
    assert_close(clip_image_features(params, jnp.asarray(images), config), expected(params, images, config))


def test_whole_clip_model():
    vision = {name: value for name, value in CONFIG.items() if name != "model_type"}
    config = {"model_type": "clip", "projection_dim": 7, "vision_config": vision, "text_config": {}}
    params, images = random_params(projection=7), random_images()
    rest = {
        "text_model.final_layer_norm.weight": np.ones(4, np.float32),
        "text_projection.weight": np.ones((7, 4), np.float32),
        "logit_scale": np.float32(4.6),
        "vision_model.embeddings.position_ids": np.arange(5)[None],
    }
    features = clip_image_features(params | rest, jnp.asarray(images), config)
    assert_close(features, expected(params, images))


def test_half_precision_weights_are_computed_in_float32():
    params, images = random_params(), random_images()
    half = {name: value.astype(np.float16) for name, value in params.items()}
    assert_close(clip_image_features(half, jnp.asarray(images), CONFIG), expected(half, images))


def primitives(jaxpr):
    """Name and input types of every operation, those of inner functions too."""
    for equation in jaxpr.eqns:
        dtypes = [variable.aval.dtype for variable in equation.invars]
        yield equation.primitive.name, {dtype.name for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner)


@pytest.mark.parametrize("projection", [None, 7])
def test_bfloat16(projection):
    params, images = random_params(projection=projection), random_images(20)
    vision = parse_vision_config(CONFIG)
    tree = to_flax_tree(params, vision)
    forward = functools.partial(vision_features, config=vision, dtype=jnp.bfloat16)
    features = forward(tree, jnp.asarray(images))
    assert features.dtype == jnp.float32
    wanted = expected(params, images)
    # bfloat16 has 8 bits: 0.4 % per rounding, over some ten roundings in a row
    assert 1e-3 < np.linalg.norm(features - wanted) / np.linalg.norm(wanted) < 0.03
    used = list(primitives(jax.make_jaxpr(forward)(tree, jnp.asarray(images)).jaxpr))
    assert {dtype for name, types in used if name == "dot_general" for dtype in types} == {"bfloat16"}
    assert {dtype for name, types in used if name in ("rsqrt", "exp", "reduce_sum") for dtype in types} == {"float32"}


def test_parameter_tree_is_that_of_hugging_face_flax():
    tree = to_flax_tree(random_params(projection=7), parse_vision_config(CONFIG))
    names = {
        "vision_model/embeddings/class_embedding": (12,),
        "vision_model/embeddings/patch_embedding/kernel": (4, 4, 3, 12),
        "vision_model/embeddings/position_embedding/embedding": (5, 12),
        "vision_model/pre_layrnorm/scale": (12,),
        "vision_model/pre_layrnorm/bias": (12,),
        "vision_model/post_layernorm/scale": (12,),
        "vision_model/post_layernorm/bias": (12,),
        "visual_projection/kernel": (12, 7),
    }
    for index in "01":
        layer = f"vision_model/encoder/layers/{index}"
        for norm in ("layer_norm1", "layer_norm2"):
            names |= {f"{layer}/{norm}/scale": (12,), f"{layer}/{norm}/bias": (12,)}
        for dense in DENSE:
            d_in, d_out = {"mlp/fc1": (12, 20), "mlp/fc2": (20, 12)}.get(dense, (12, 12))
            names |= {f"{layer}/{dense}/kernel": (d_in, d_out), f"{layer}/{dense}/bias": (d_out,)}
    shapes = {"/".join(path): value.shape for path, value in traverse_util.flatten_dict(tree).items()}
    assert shapes == names
    module = ClipVisionModule(parse_vision_config(CONFIG), 7)
    initial = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 3, 10, 10)))["params"]
    assert {"/".join(k): v.shape for k, v in traverse_util.flatten_dict(initial).items()} == names


def test_jit_and_vmap_over_models():
    many = [random_params(seed=seed) for seed in range(3)]
    images = jnp.asarray(random_images())
    stacked = {name: jnp.stack([params[name] for params in many]) for name in many[0]}
    program = jax.jit(jax.vmap(functools.partial(clip_image_features, config=CONFIG), in_axes=(0, None)))
    features = program(stacked, images)
    for params, one in zip(many, features, strict=True):
        assert_close(one, expected(params, np.asarray(images)))


def test_jit_compiles_once():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def program(params, images):
        return clip_image_features(params, images, CONFIG)

    for seed in range(3):
        program(random_params(seed=seed), jnp.asarray(random_images(seed=seed)))


def test_every_tensor_problem_is_listed():
    params = random_params()
    del params["vision_model.post_layernorm.bias"]
    params["vision_model.encoder.layers.1.mlp.fc1.weight"] = np.zeros((12, 20), np.float32)  # transposed
    params["vision_model.encoder.layers.2.mlp.fc1.bias"] = np.zeros(20, np.float32)
    with pytest.raises(CheckpointError) as caught:
        clip_image_features(params, jnp.asarray(random_images()), CONFIG)
    found = {problem.tensor: problem.what for problem in caught.value.problems}
    assert found == {
        "vision_model.post_layernorm.bias": "missing",
        "vision_model.encoder.layers.1.mlp.fc1.weight": "shape is (12, 20), config.json describes (20, 12)",
        "vision_model.encoder.layers.2.mlp.fc1.bias": UNKNOWN,
    }


def test_text_tensors_are_refused_in_a_vision_model():
    params = random_params() | {"logit_scale": np.float32(1)}
    with pytest.raises(CheckpointError, match="logit_scale: no such tensor"):
        clip_image_features(params, jnp.asarray(random_images()), CONFIG)


@pytest.mark.parametrize("shape", [(2, 3, 8, 10), (2, 3, 12, 12), (2, 1, 10, 10)], ids=str)
def test_images_of_another_size_are_refused(shape):
    with pytest.raises(CheckpointError, match=r"images are .* describes \(3, 10, 10\)"):
        clip_image_features(random_params(), jnp.zeros(shape), CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type is 't5'"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": "clip"}, "vision_config is None"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"hidden_size": "12"}, "hidden_size is '12'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0"),
        ({"num_attention_heads": 5}, "hidden_size 12 is no multiple of num_attention_heads 5"),
        ({"patch_size": 16}, "patch_size 16 is larger than image_size 10"),
    ],
)
def test_unusable_configs_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        parse_vision_config(CONFIG | change)


def test_missing_config_values_are_those_of_transformers():
    config = parse_vision_config({"model_type": "clip", "vision_config": {"patch_size": 14}})
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (768, 3072, 12)
    assert (config.num_attention_heads, config.image_size, config.patch_size) == (12, 224, 14)
    assert (config.hidden_act, config.layer_norm_eps, config.num_positions) == ("quick_gelu", 1e-5, 257)
