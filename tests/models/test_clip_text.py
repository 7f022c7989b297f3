import functools

import chex
import clip_text_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from nufilt_jax.errors import CheckpointError
from nufilt_jax.models import (
    ClipTextModule,
    clip_text_features,
    parse_text_config,
    text_features,
    text_shapes,
    to_text_tree,
)

EOS = 17
CONFIG = {
    "model_type": "clip_text_model",
    "vocab_size": 20,
    "hidden_size": 12,
    "intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 0.01,  # large enough to be seen
    "eos_token_id": EOS,
}
OLD = CONFIG | {"eos_token_id": 2}
UNKNOWN = "no such tensor in the model that config.json describes"


def random_params(seed=0, projection=None):
    rng = np.random.default_rng(seed)
    shapes = dict(text_shapes(parse_text_config(CONFIG)))
    if projection:
        shapes["text_projection.weight"] = (projection, 12)
    return {name: rng.normal(0.1, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


def texts(seed=1, t=8):
    """Ids and mask; the texts end at different places, the last at the very end, and are padded after that."""
    ids = np.random.default_rng(seed).integers(3, EOS, (3, t)).astype(np.int32)
    mask = np.ones((3, t), np.int32)
    for text, end in enumerate((3, 5, t - 1)):
        ids[text, end] = EOS
        ids[text, end + 1 :] = 1
        mask[text, end + 1 :] = 0
    return ids, mask


def on_device(*arrays):
    return [jnp.asarray(array) for array in arrays]


def expected(params, inputs, config=CONFIG):
    return np.stack([reference.text_features(params, *text, config) for text in zip(*inputs, strict=True)])


def assert_close(actual, wanted):
    # float32 over some dozen sums of 4 to 14 terms; outputs are of order one
    np.testing.assert_allclose(actual, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("activation", "projection"), [("quick_gelu", None), ("gelu", 7)])
def test_forward_equals_reference(activation, projection):
    config = CONFIG | {"hidden_act": activation}
    params, inputs = random_params(projection=projection), texts()
    features = clip_text_features(params, *on_device(*inputs), config)
    assert features.dtype == jnp.float32
    assert features.shape == (3, projection or 12)
    assert_close(features, expected(params, inputs, config))


def test_the_first_end_token_is_pooled():
    params, (ids, mask) = random_params(), texts()
    padded = np.where(mask == 0, EOS, ids)  # as OpenAI's tokenizer pads
    every = np.ones_like(mask)
    assert_close(clip_text_features(params, *on_device(padded, every), CONFIG), expected(params, (ids, mask)))


def test_old_configs_pool_the_highest_token():
    params, (ids, mask) = random_params(), texts()
    assert_close(clip_text_features(params, *on_device(ids, mask), OLD), expected(params, (ids, mask)))
    ids[:, 1] = EOS + 2  # a token that was added later, at which they go wrong; both rules are transformers'
    old = clip_text_features(params, *on_device(ids, mask), OLD)
    assert_close(old, expected(params, (ids, mask), OLD))
    assert np.abs(old - clip_text_features(params, *on_device(ids, mask), CONFIG)).min(axis=1).max() > 1e-3


def test_without_an_end_token_the_first_is_pooled():
    params, (ids, mask) = random_params(), texts()
    nowhere = np.where(ids == EOS, 4, ids)
    # The first token sees itself alone.
    single = [reference.text_features(params, text[:1], [1], CONFIG | {"eos_token_id": text[0]}) for text in nowhere]
    assert_close(clip_text_features(params, *on_device(nowhere, mask), CONFIG), np.stack(single))


def test_what_comes_after_the_end_changes_nothing():
    params, (ids, mask) = random_params(), texts()
    features = clip_text_features(params, *on_device(ids, mask), CONFIG)
    for filler in (0, EOS + 1):
        for seen in (mask, np.ones_like(mask)):
            other = np.where(mask == 0, filler, ids)
            np.testing.assert_array_equal(clip_text_features(params, *on_device(other, seen), CONFIG), features)
    shorter = on_device(ids[:2, :6], mask[:2, :6] == 1)
    assert_close(clip_text_features(params, *shorter, CONFIG), features[:2])


def test_every_token_up_to_the_end_counts():
    params, (ids, mask) = random_params(), texts()
    features = clip_text_features(params, *on_device(ids, mask), CONFIG)
    for position in range(7):
        changed = ids.copy()
        changed[:, position] = np.where(ids[:, position] == EOS, EOS, (ids[:, position] - 2) % 14 + 3)
        after = clip_text_features(params, *on_device(changed, mask), CONFIG)
        moved = np.abs(after - features).max(axis=1) > 1e-4
        np.testing.assert_array_equal(moved, (mask[:, position] == 1) & (ids[:, position] != EOS))


def test_padding_inside_a_text_is_not_seen():
    params, (ids, mask) = random_params(), texts()
    mask[:, 0] = 0  # the first token then sees nothing at all
    mask[:, 2] = 0
    features = clip_text_features(params, *on_device(ids, mask), CONFIG)
    assert jnp.isfinite(features).all()
    ids[:, [0, 2]] = 5
    assert_close(clip_text_features(params, *on_device(ids, mask), CONFIG), features)


def test_whole_clip_model():
    text = {name: value for name, value in CONFIG.items() if name != "model_type"}
    config = {"model_type": "clip", "projection_dim": 7, "text_config": text, "vision_config": {}}
    params, inputs = random_params(projection=7), texts()
    rest = {
        "vision_model.post_layernorm.weight": np.ones(4, np.float32),
        "visual_projection.weight": np.ones((7, 4), np.float32),
        "logit_scale": np.float32(4.6),
        "text_model.embeddings.position_ids": np.arange(9)[None],
    }
    assert_close(clip_text_features(params | rest, *on_device(*inputs), config), expected(params, inputs))


def test_half_precision_weights_are_computed_in_float32():
    inputs = texts()
    half = {name: value.astype(np.float16) for name, value in random_params().items()}
    assert_close(clip_text_features(half, *on_device(*inputs), CONFIG), expected(half, inputs))


def test_parameter_tree_is_that_of_hugging_face_flax():
    names = {
        "text_model/embeddings/token_embedding/embedding": (20, 12),
        "text_model/embeddings/position_embedding/embedding": (9, 12),
        "text_model/final_layer_norm/scale": (12,),
        "text_model/final_layer_norm/bias": (12,),
        "text_projection/kernel": (12, 7),
    }
    for index in "01":
        layer = f"text_model/encoder/layers/{index}"
        for norm in ("layer_norm1", "layer_norm2"):
            names |= {f"{layer}/{norm}/scale": (12,), f"{layer}/{norm}/bias": (12,)}
        attention = {f"self_attn/{name}_proj": (12, 12) for name in ("q", "k", "v", "out")}
        for dense, (d_in, d_out) in (attention | {"mlp/fc1": (12, 14), "mlp/fc2": (14, 12)}).items():
            names |= {f"{layer}/{dense}/kernel": (d_in, d_out), f"{layer}/{dense}/bias": (d_out,)}
    text = parse_text_config(CONFIG)
    tree = to_text_tree(random_params(projection=7), text)
    assert {"/".join(path): value.shape for path, value in traverse_util.flatten_dict(tree).items()} == names
    initial = jax.eval_shape(ClipTextModule(text, 7).init, jax.random.key(0), *on_device(*texts()))["params"]
    assert {"/".join(path): value.shape for path, value in traverse_util.flatten_dict(initial).items()} == names


def test_jit_and_vmap_over_models():
    many = [random_params(seed=seed) for seed in range(3)]
    inputs = texts()
    stacked = {name: jnp.stack([params[name] for params in many]) for name in many[0]}
    program = jax.jit(jax.vmap(functools.partial(clip_text_features, config=CONFIG), in_axes=(0, None, None)))
    for params, one in zip(many, program(stacked, *on_device(*inputs)), strict=True):
        assert_close(one, expected(params, inputs))


def test_one_program_per_shape():
    sizes = set()
    for seed in range(3):
        clip_text_features(random_params(seed=seed), *on_device(*texts(seed)), CONFIG)
        sizes.add(text_features._cache_size())
    assert len(sizes) == 1


def test_every_tensor_that_the_end_sees_has_a_gradient():
    inputs = on_device(*texts())

    def loss(params):
        return jnp.square(clip_text_features(params, *inputs, CONFIG)).mean()

    params = {name: jnp.asarray(value) for name, value in random_params().items()}
    gradients = jax.jit(jax.grad(loss))(params)
    chex.assert_tree_all_finite(gradients)
    without = [name for name, value in gradients.items() if not np.abs(value).max() > 1e-6]
    # Softmax does not change if all scores move alike.
    assert without == [f"text_model.encoder.layers.{index}.self_attn.k_proj.bias" for index in (0, 1)]


def test_every_tensor_problem_is_listed():
    params = random_params(projection=7) | {"text_projection.weight": np.zeros((7, 11), np.float32)}
    del params["text_model.final_layer_norm.bias"]
    params["text_model.encoder.layers.1.mlp.fc1.weight"] = np.zeros((12, 14), np.float32)  # transposed
    params["logit_scale"] = np.float32(1)  # of a whole model
    with pytest.raises(CheckpointError) as caught:
        clip_text_features(params, *on_device(*texts()), CONFIG)
    found = {problem.tensor: problem.what for problem in caught.value.problems}
    assert found == {
        "text_model.final_layer_norm.bias": "missing",
        "text_model.encoder.layers.1.mlp.fc1.weight": "shape is (12, 14), config.json describes (14, 12)",
        "text_projection.weight": "shape is (7, 11), config.json describes (7, 12)",
        "logit_scale": UNKNOWN,
    }


def test_unusable_inputs_are_refused():
    params, (ids, mask) = random_params(), on_device(*texts(t=10))
    with pytest.raises(CheckpointError, match=r"input_ids: texts of 10 tokens, config\.json allows 9 \(truncate them"):
        clip_text_features(params, ids, mask, CONFIG)
    with pytest.raises(CheckpointError, match=r"attention_mask: shape is \(1, 8\), that of input_ids is \(3, 8\)"):
        clip_text_features(params, ids[:, :8], mask[:1, :8], CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip_vision_model"}, "model_type is 'clip_vision_model', not 'clip' or 'clip_text_model'"),
        ({"model_type": "clip"}, "text_config is None, not an object"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"vocab_size": 0}, "vocab_size is 0, not a positive integer"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\], not a positive integer"),
        ({"layer_norm_eps": 1}, "layer_norm_eps is 1,"),
        ({"num_attention_heads": 5}, "hidden_size 12 is no multiple of num_attention_heads 5"),
    ],
)
def test_unusable_configs_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        parse_text_config(CONFIG | change)


def test_missing_config_values_are_those_of_transformers():
    config = parse_text_config({"model_type": "clip", "text_config": {"num_hidden_layers": 3}})
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (512, 2048, 3)
    assert (config.num_attention_heads, config.vocab_size, config.max_position_embeddings) == (8, 49408, 77)
    assert (config.hidden_act, config.layer_norm_eps, config.eos_token_id) == ("quick_gelu", 1e-5, 49407)
