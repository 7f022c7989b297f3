import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5_reference as reference
from flax import traverse_util

from nufilt_jax.errors import CheckpointError, ConfigError
from nufilt_jax.models import (
    T5Module,
    parse_t5_config,
    t5_generate,
    t5_logits,
    t5_shapes,
    t5_tree_generate,
    t5_tree_logits,
    to_t5_tree,
)
from nufilt_jax.models.t5_positions import relative_buckets

CONFIG = {
    "model_type": "t5",
    "vocab_size": 19,
    "d_model": 12,
    "d_kv": 5,  # two heads of 5 do not fill 12
    "d_ff": 14,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,  # exceeded by the texts
    "layer_norm_epsilon": 0.01,  # large enough to be seen
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
SMALL = CONFIG | {"num_layers": 1, "num_decoder_layers": 2}  # compiles sooner
TIED = CONFIG | {"tie_word_embeddings": True}
# How transformers 5 writes the untied one.
FIVE = CONFIG | {"tie_word_embeddings": True, "scale_decoder_outputs": False}
SEED = 6  # of parameters that generate different tokens, and the end token in one of the texts
UNKNOWN = "no such tensor in the model that config.json describes"
CROSS_TABLE = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def random_params(config=CONFIG, seed=0):
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in t5_shapes(parse_t5_config(config)).items():
        if len(shape) == 1:
            params[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            # Inputs of linear layers are of order one, and so are their outputs. Embeddings are small beside them:
            # else the token just read would be the likeliest wherever the embedding is the head.
            scale = 0.3 if name.startswith("shared") else 1 if "bias" in name else shape[1] ** -0.5
            params[name] = rng.normal(0, scale, shape).astype(np.float32)
    return params


def texts(seed=0, n=3, t=11, t_dec=9):
    """Token ids, mask (padding on either side) and decoder ids."""
    rng = np.random.default_rng(seed)
    ids, decoder_ids = (rng.integers(2, 19, (n, length)).astype(np.int32) for length in (t, t_dec))
    mask = np.ones((n, t), np.int32)
    mask[1, -4:] = 0
    mask[2, :3] = 0
    decoder_ids[:, 0] = 0
    return ids, mask, decoder_ids


def on_device(*arrays):
    return [jnp.asarray(array) for array in arrays]


def expected(params, inputs, config, *, scaled):
    return np.stack([reference.logits(params, *text, config, scaled=scaled) for text in zip(*inputs, strict=True)])


def assert_close(actual, wanted):
    # float32 over five blocks of sums of 5 to 14 terms; logits are of order one to ten
    np.testing.assert_allclose(actual, wanted, atol=3e-5, rtol=1e-5)


CASES = {
    "untied": (CONFIG, True, False),
    "tied": (TIED | {"feed_forward_proj": "relu"}, False, True),
    "tied, own head": (TIED, True, True),  # transformers 5 keeps a stored head that differs, and scales
    # Made untied by transformers 5: the embedding is the head, unscaled.
    "unscaled": (FIVE | {"feed_forward_proj": "gated-silu"}, False, False),
}


@pytest.mark.parametrize(("config", "head", "scaled"), CASES.values(), ids=CASES)
def test_forward_equals_reference(config, head, scaled):
    params, inputs = random_params(config | {"tie_word_embeddings": not head}), texts()
    assert ("lm_head.weight" in params) is head
    logits = t5_logits(params, *on_device(*inputs), config)
    assert logits.dtype == jnp.float32
    assert logits.shape == (3, 9, 19)
    assert_close(logits, expected(params, inputs, config, scaled=scaled))


def test_both_spellings_of_an_untied_config():
    four, five = parse_t5_config(CONFIG), parse_t5_config(FIVE)
    assert (four.has_head, four.scale_outputs) == (True, False)
    assert (five.has_head, five.scale_outputs) == (False, False)  # whether there is a head, the file says


def test_an_untied_model_needs_its_head():
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing"):
        t5_logits(random_params(TIED), *on_device(*texts()), CONFIG)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 6), (8, 128), (4, 3), (7, 20), (64, 256)])
def test_relative_buckets(bidirectional, n_buckets, max_distance):
    queries, keys = np.array([0, 5, 700, 1500]), np.arange(1501)
    relative = keys[None] - queries[:, None]
    found = relative_buckets(
        jnp.asarray(relative), bidirectional=bidirectional, n_buckets=n_buckets, max_distance=max_distance
    )
    wanted = [[reference.bucket(r, bidirectional, n_buckets, max_distance) for r in row] for row in relative.tolist()]
    np.testing.assert_array_equal(found, wanted)


def test_padding_changes_nothing():
    params = random_params()
    ids, _, decoder_ids = texts()
    alone = t5_logits(params, *on_device(ids, np.ones_like(ids), decoder_ids), CONFIG)
    for before, after in ((0, 6), (6, 0), (2, 4)):
        for filler in (0, 7):  # what stands at padding does not matter
            wider = np.pad(ids, ((0, 0), (before, after)), constant_values=filler)
            mask = np.pad(np.ones(ids.shape, bool), ((0, 0), (before, after)))
            assert_close(t5_logits(params, *on_device(wider, mask, decoder_ids), CONFIG), alone)


def test_a_text_of_padding_alone_is_finite():
    ids, mask, decoder_ids = texts()
    mask[0] = 0
    assert jnp.isfinite(t5_logits(random_params(), *on_device(ids, mask, decoder_ids), CONFIG)).all()


def test_decoder_sees_no_later_token():
    params, (ids, mask, decoder_ids) = random_params(), texts()
    before = t5_logits(params, *on_device(ids, mask, decoder_ids), CONFIG)
    for position in range(decoder_ids.shape[1]):
        changed = decoder_ids.copy()
        changed[:, position] = (changed[:, position] + 1) % 19
        after = t5_logits(params, *on_device(ids, mask, changed), CONFIG)
        np.testing.assert_array_equal(after[:, :position], before[:, :position])
        assert (np.abs(after - before)[:, position:].max(axis=(0, 2)) > 1e-4).all()


def test_encoder_sees_every_token():
    params, (ids, mask, decoder_ids) = random_params(), texts()
    before = t5_logits(params, *on_device(ids, mask, decoder_ids), CONFIG)
    for position in range(ids.shape[1]):
        changed = ids.copy()
        changed[:, position] = (changed[:, position] + 1) % 19
        after = t5_logits(params, *on_device(changed, mask, decoder_ids), CONFIG)
        moved = np.abs(after - before).max(axis=(1, 2))
        np.testing.assert_array_equal(moved > 1e-4, mask[:, position] == 1)


def test_steps_with_cache_equal_the_whole():
    params, inputs = random_params(SMALL), texts(t_dec=17)
    t5 = parse_t5_config(SMALL)
    tree = to_t5_tree(params, t5)
    sizes = (1, 1, 15)

    @jax.jit
    def in_parts(tree, ids, mask, decoder_ids):
        apply = functools.partial(T5Module(t5, separate_head=True).apply, {"params": tree})
        memory = apply(ids, mask, method="encode")
        # Room for more than is used, filled with what must never be read.
        cache = tuple(jax.tree.map(lambda a: jnp.full((3, 20, *a.shape[2:]), 1e3), block) for block in memory.blocks)
        parts, first = [], jnp.int32(0)
        for size in sizes:
            tokens = jax.lax.dynamic_slice_in_dim(decoder_ids, first, size, axis=1)
            logits, cache = apply(tokens, memory, cache, first, method="decode")
            parts.append(logits)
            first += size
        return jnp.concatenate(parts, axis=1)

    inputs = on_device(*inputs)
    assert_close(in_parts(tree, *inputs), t5_tree_logits(tree, *inputs, t5))


def test_generation_equals_reference():
    params, (ids, mask, _) = random_params(seed=SEED), texts()
    found = t5_generate(params, *on_device(ids, mask), CONFIG, max_new_tokens=12)
    wanted = [reference.generate(params, *text, CONFIG, 12, scaled=False) for text in zip(ids, mask, strict=True)]
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, wanted)
    assert len(np.unique(found)) > 3
    assert (found[:, -1] == 0).tolist() == [True, False, False]  # else this test is void


def generated(n_tokens=12, seed=SEED, **change):
    params, (ids, mask, _) = random_params(seed=seed), texts()
    return np.asarray(t5_generate(params, *on_device(ids, mask), CONFIG | change, max_new_tokens=n_tokens))


def test_after_the_end_there_is_padding():
    endless = generated(seed=8, eos_token_id=None, decoder_start_token_id=5)
    eos = [int(endless[0, 5]), int(endless[1, 5])]
    wanted = endless.copy()
    for text in wanted:
        ends = np.flatnonzero(np.isin(text, eos))
        text[ends[0] + 1 if len(ends) else len(text) :] = 17
    assert (wanted[:, -1] == 17).tolist() == [True, True, False]
    ended = generated(seed=8, eos_token_id=eos, pad_token_id=17, decoder_start_token_id=5)
    np.testing.assert_array_equal(ended, wanted)


def test_generation_starts_with_the_token_of_the_config():
    params, (ids, mask, decoder_ids) = random_params(seed=SEED), on_device(*texts())
    first = generated(eos_token_id=None, decoder_start_token_id=5)[:, 0]
    logits = t5_logits(params, ids, mask, decoder_ids.at[:, 0].set(5), CONFIG)
    np.testing.assert_array_equal(first, jnp.argmax(logits[:, 0], axis=-1))
    assert (first != generated()[:, 0]).any()  # which starts with 0


def test_generation_without_a_start_token_is_refused():
    with pytest.raises(CheckpointError, match="decoder_start_token_id is None"):
        generated(decoder_start_token_id=None)


@pytest.mark.parametrize("n_tokens", [0, -1])
def test_generation_of_nothing_is_refused(n_tokens):
    with pytest.raises(ConfigError, match=f"max_new_tokens: must be at least 1, got {n_tokens}"):
        generated(n_tokens)


def test_bfloat16_is_close_to_float32():
    params, inputs = random_params(SMALL), on_device(*texts())
    exact, half = (t5_logits(params, *inputs, SMALL, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    rounded = {name: jnp.asarray(value).astype(jnp.bfloat16) for name, value in params.items()}
    from_weights = jnp.abs(t5_logits(rounded, *inputs, SMALL) - exact).mean()
    assert half.dtype == jnp.float32
    # Activations are rounded as often as weights.
    assert 0.5 * from_weights < jnp.abs(half - exact).mean() < 3 * from_weights
    first = t5_generate(params, *inputs[:2], SMALL, max_new_tokens=12, dtype=jnp.bfloat16)[:, :1]
    chosen = jnp.take_along_axis(half[:, 0], first, axis=1)
    np.testing.assert_allclose(chosen[:, 0], half[:, 0].max(axis=1), atol=0.05)


def test_half_precision_weights_are_computed_in_float32():
    params, inputs = random_params(), texts()
    half = {name: value.astype(np.float16) for name, value in params.items()}
    assert_close(t5_logits(half, *on_device(*inputs), CONFIG), expected(half, inputs, CONFIG, scaled=False))


def test_other_types_are_refused():
    with pytest.raises(ConfigError, match="float16 is not float32 or bfloat16"):
        t5_logits(random_params(), *on_device(*texts()), CONFIG, dtype=jnp.float16)


def test_tables_of_old_checkpoints_are_left_aside():
    params, inputs = random_params(), on_device(*texts())
    old = params | {CROSS_TABLE: np.ones((8, 2), np.float32)}
    np.testing.assert_array_equal(t5_logits(old, *inputs, CONFIG), t5_logits(params, *inputs, CONFIG))


def hugging_face_names():
    names = {"shared/embedding": (19, 12), "lm_head/kernel": (12, 19)}
    for stack, n_blocks, attentions in (("encoder", 2, ["Self"]), ("decoder", 3, ["Self", "EncDec"])):
        names[f"{stack}/final_layer_norm/weight"] = (12,)
        names[f"{stack}/block/0/layer/0/SelfAttention/relative_attention_bias/embedding"] = (8, 2)
        for block in range(n_blocks):
            layers = f"{stack}/block/{block}/layer"
            for index, attention in enumerate(attentions):
                names[f"{layers}/{index}/layer_norm/weight"] = (12,)
                for name in "qkv":
                    names[f"{layers}/{index}/{attention}Attention/{name}/kernel"] = (12, 10)
                names[f"{layers}/{index}/{attention}Attention/o/kernel"] = (10, 12)
            last = f"{layers}/{len(attentions)}"
            names[f"{last}/layer_norm/weight"] = (12,)
            for name, shape in (("wi_0", (12, 14)), ("wi_1", (12, 14)), ("wo", (14, 12))):
                names[f"{last}/DenseReluDense/{name}/kernel"] = shape
    return names


def test_parameter_tree_is_that_of_hugging_face_flax():
    t5 = parse_t5_config(CONFIG)
    names = hugging_face_names()
    tree = to_t5_tree(random_params(), t5)
    assert {"/".join(path): value.shape for path, value in traverse_util.flatten_dict(tree).items()} == names
    module = T5Module(t5, separate_head=True)
    initial = jax.eval_shape(module.init, jax.random.key(0), *on_device(*texts()))["params"]
    assert {"/".join(path): value.shape for path, value in traverse_util.flatten_dict(initial).items()} == names


def test_vmap_over_models():
    many = [random_params(SMALL, seed) for seed in range(2)]
    inputs = texts()
    ids, mask, decoder_ids = on_device(*inputs)
    stacked = {name: jnp.stack([params[name] for params in many]) for name in many[0]}
    logits = jax.vmap(lambda params: t5_logits(params, ids, mask, decoder_ids, SMALL))(stacked)
    for params, one in zip(many, logits, strict=True):
        assert_close(one, expected(params, inputs, SMALL, scaled=False))


def test_every_tensor_has_a_gradient():
    inputs = on_device(*texts())

    def loss(params):
        return jnp.square(t5_logits(params, *inputs, SMALL)).mean()

    gradients = jax.jit(jax.grad(loss))({name: jnp.asarray(value) for name, value in random_params(SMALL).items()})
    chex.assert_tree_all_finite(gradients)
    assert [name for name, value in gradients.items() if not np.abs(value).max() > 1e-6] == []


def test_one_program_per_shape():
    sizes = set()
    for seed in range(3):
        params, inputs = random_params(seed=seed), on_device(*texts(seed))
        t5_logits(params, *inputs, CONFIG)
        t5_generate(params, *inputs[:2], CONFIG, max_new_tokens=12)
        sizes.add((t5_tree_logits._cache_size(), t5_tree_generate._cache_size()))
    assert len(sizes) == 1


def test_every_tensor_problem_is_listed():
    params = random_params()
    del params["encoder.final_layer_norm.weight"]
    params["decoder.block.1.layer.2.DenseReluDense.wo.weight"] = np.zeros((14, 12), np.float32)  # transposed
    params["encoder.block.2.layer.0.layer_norm.weight"] = np.zeros(12, np.float32)
    params["lm_head.weight"] = np.zeros((19, 11), np.float32)
    with pytest.raises(CheckpointError) as caught:
        t5_logits(params, *on_device(*texts()), CONFIG)
    found = {problem.tensor: problem.what for problem in caught.value.problems}
    assert found == {
        "encoder.final_layer_norm.weight": "missing",
        "decoder.block.1.layer.2.DenseReluDense.wo.weight": "shape is (14, 12), config.json describes (12, 14)",
        "encoder.block.2.layer.0.layer_norm.weight": UNKNOWN,
        "lm_head.weight": "shape is (19, 11), config.json describes (19, 12)",
    }


def test_inputs_that_do_not_belong_together_are_refused():
    params, (ids, mask, decoder_ids) = random_params(), on_device(*texts())
    with pytest.raises(CheckpointError, match=r"decoder_input_ids: 2 texts, input_ids holds 3"):
        t5_logits(params, ids, mask, decoder_ids[:2], CONFIG)
    wrong = r"attention_mask: shape is \(1, 11\), that of input_ids is \(3, 11\)"
    with pytest.raises(CheckpointError, match=wrong):
        t5_logits(params, ids, mask[:1], decoder_ids, CONFIG)
    with pytest.raises(CheckpointError, match=wrong):
        t5_generate(params, ids, mask[:1], CONFIG, max_new_tokens=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip"}, "model_type is 'clip', not 't5'"),
        ({"d_model": "12"}, "d_model is '12', not a positive integer"),
        ({"num_decoder_layers": 0}, "num_decoder_layers is 0, not a positive integer"),
        ({"num_heads": True}, "num_heads is True, not a positive integer"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0"),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj is 'gelu', not one of 'relu', 'gated-gelu', 'gated-silu'"),
        ({"pad_token_id": None}, "pad_token_id is None, not a token id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id is '2', not a token id"),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id is -1, not a token id"),
        ({"relative_attention_num_buckets": 3}, "relative_attention_num_buckets is 3, fewer than 4"),
        ({"relative_attention_max_distance": 4}, "relative_attention_max_distance 4 is not above half of the 8"),
    ],
)
def test_unusable_configs_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        parse_t5_config(CONFIG | change)


def test_all_problems_of_a_config_are_listed():
    with pytest.raises(CheckpointError) as caught:
        parse_t5_config(CONFIG | {"d_kv": 0, "feed_forward_proj": "tanh"})
    assert len(caught.value.problems) == 2


def test_missing_config_values_are_those_of_transformers():
    config = parse_t5_config({"model_type": "t5", "num_layers": 4})
    assert (config.vocab_size, config.d_model, config.d_kv, config.d_ff, config.num_heads) == (32128, 512, 64, 2048, 8)
    assert (config.num_layers, config.num_decoder_layers) == (4, 4)
    assert (config.relative_attention_num_buckets, config.relative_attention_max_distance) == (32, 128)
    assert (config.layer_norm_epsilon, config.feed_forward_proj, config.is_gated) == (1e-6, "relu", False)
    assert (config.has_head, config.scale_outputs) == (False, True)
    assert (config.pad_token_id, config.eos_token_ids, config.decoder_start_token_id) == (0, (1,), None)
