import jax
import jax.numpy as jnp
import mixture_reference as reference
import numpy as np
import pytest

from nufilt_jax.errors import CheckpointError
from nufilt_jax.models import (
    canonical_shapes,
    clip_image_features,
    parse_vision_config,
    to_flax_tree,
    vision_features,
)
from nufilt_jax.models.experts import has_experts

CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 10,
    "patch_size": 4,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
MLP = "vision_model.encoder.layers.{}.mlp"
GATE, BIAS = MLP.format(1) + ".gate.weight", MLP.format(1) + ".gate.bias"
A, B = MLP.format(1) + ".fc1.experts.1.a", MLP.format(1) + ".fc1.experts.1.b"


def plain_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = canonical_shapes(parse_vision_config(CONFIG))
    return {name: rng.normal(0.1, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


def mixture(seed=0, ranks=(4, 2, 3), parts=("fc1", "fc2"), blocks=(0, 1)):
    """A tower with one expert per rank; gates large enough to matter."""
    rng = np.random.default_rng(seed + 1)
    params = plain_params(seed)
    for block in (MLP.format(i) for i in blocks):
        params[f"{block}.gate.weight"] = rng.normal(0, 0.3, (len(ranks), 12))
        params[f"{block}.gate.bias"] = rng.normal(0.3, 0.3, len(ranks))
        for part in parts:
            m, n = params[f"{block}.{part}.weight"].shape
            for i, rank in enumerate(ranks):
                params[f"{block}.{part}.experts.{i}.a"] = rng.normal(0, 0.5, (rank, n))
                params[f"{block}.{part}.experts.{i}.b"] = rng.normal(0, 0.5, (m, rank))
    return {name: x.astype(np.float32) for name, x in params.items()}


def random_images(n, seed=1):
    return np.random.default_rng(seed).standard_normal((n, 3, 10, 10)).astype(np.float32)


def features(params, images):
    return np.asarray(clip_image_features(params, jnp.asarray(images), CONFIG))


def assert_close(actual, wanted):
    # float32 over some dozen sums of 4 to 48 terms; outputs are of order one
    np.testing.assert_allclose(actual, wanted, atol=3e-5, rtol=3e-5)


# 5 tokens pass through the factors of a 20 by 12 matrix, 7.5 would break even, 15 build it; 11 experts sort as text
# in another order than as numbers.
@pytest.mark.parametrize("n_images", [1, 3])
@pytest.mark.parametrize("ranks", [(4, 2, 3), (1,), (0, 2), tuple(range(1, 12))], ids=str)
def test_forward_equals_reference(n_images, ranks):
    params, images = mixture(ranks=ranks), random_images(n_images)
    assert_close(features(params, images), reference.batch_features(params, images, CONFIG))


@pytest.mark.parametrize("options", [{"parts": ("fc1",)}, {"parts": ("fc2",)}, {"blocks": (1,)}], ids=str)
def test_some_matrices_may_have_no_experts(options):
    params, images = mixture(**options), random_images(2)
    assert_close(features(params, images), reference.batch_features(params, images, CONFIG))


@pytest.mark.parametrize("n_images", [1, 3])
def test_zero_gates_give_one_plain_model_for_any_input(n_images):
    """W = θ0 + Σ g_i B_i A_i, g the bias."""
    params, merged = mixture(), plain_params()
    for i in range(2):
        params[f"{MLP.format(i)}.gate.weight"] *= 0
        bias = params[f"{MLP.format(i)}.gate.bias"]
        for part in ("fc1", "fc2"):
            stem = f"{MLP.format(i)}.{part}"
            merged[f"{stem}.weight"] += sum(
                g * params[f"{stem}.experts.{e}.b"] @ params[f"{stem}.experts.{e}.a"] for e, g in enumerate(bias)
            )
    for seed in (1, 2):
        images = random_images(n_images, seed)
        assert_close(features(params, images), features(merged, images))


def test_permuting_a_batch_permutes_its_features():
    params, images = mixture(), random_images(4)
    order = np.array([2, 0, 3, 1])
    together = features(params, images)
    assert_close(features(params, images[order]), together[order])
    assert np.abs(features(params, images[:2]) - together[:2]).max() > 1e-2  # the rest of the batch matters


def test_plain_models_are_computed_as_before():
    """No trace of experts: a plain model's program holds one product per linear layer and nothing joined but tokens."""
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in plain_params().items()}
    images = jax.ShapeDtypeStruct((3, 3, 10, 10), jnp.float32)
    program = str(jax.make_jaxpr(lambda p, x: clip_image_features(p, x, CONFIG))(shapes, images))
    assert program.count(" concatenate[") == 1
    assert program.count("dot_general[") == 1 + 2 * (4 + 2 + 2)  # patches; q, k, v, out, scores, mixing, fc1, fc2


def test_jit_and_vmap_over_models():
    many = [mixture(seed) for seed in range(2)]
    images = random_images(3)
    stacked = {name: jnp.stack([params[name] for params in many]) for name in many[0]}
    program = jax.jit(jax.vmap(lambda p, x: clip_image_features(p, x, CONFIG), in_axes=(0, None)))
    for params, one in zip(many, program(stacked, jnp.asarray(images)), strict=True):
        assert_close(one, reference.batch_features(params, images, CONFIG))


def test_bfloat16_is_near():
    params, images = mixture(), random_images(3)
    config = parse_vision_config(CONFIG)
    found = vision_features(to_flax_tree(params, config), jnp.asarray(images), config, dtype=jnp.bfloat16)
    wanted = features(params, images)
    # bfloat16 has 8 bits: 0.4 % per rounding, over some ten roundings in a row
    assert 1e-4 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.03


def test_gates_have_gradients():
    images = jnp.asarray(random_images(2))
    slope = jax.jit(jax.grad(lambda p: jnp.sum(clip_image_features(p, images, CONFIG) ** 2)))(mixture())
    assert all(np.abs(slope[name]).min() > 0 for name in (GATE, BIAS))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({A: None}, {A: "missing", B: "shape is (20, 2), config.json describes (20, 0)"}),
        ({B: None}, {B: "missing"}),
        ({GATE: None}, {GATE: "missing"}),
        ({BIAS: np.zeros(2)}, {BIAS: "shape is (2,), config.json describes (3,)"}),
        ({GATE: np.zeros((12, 3))}, {GATE: "shape is (12, 3), config.json describes (3, 12)"}),
        ({B: np.zeros((20, 5))}, {B: "shape is (20, 5), config.json describes (20, 2)"}),
        ({A: np.zeros((2, 20))}, {A: "shape is (2, 20), config.json describes (2, 12)"}),
        (
            {"vision_model.encoder.layers.0.self_attn.q_proj.experts.0.a": np.zeros((2, 12))},
            {"vision_model.encoder.layers.0.self_attn.q_proj.experts.0.a": "no such tensor"},
        ),
        (
            {MLP.format(2) + ".fc1.experts.0.a": np.zeros((2, 12))},
            {MLP.format(2) + ".fc1.experts.0.a": "no such tensor"},
        ),
    ],
)
def test_misfitting_gates_and_experts_are_refused(change, found):
    params = {name: x for name, x in (mixture() | change).items() if x is not None}
    with pytest.raises(CheckpointError) as caught:
        features(params, random_images(1))
    problems = {problem.tensor: problem.what for problem in caught.value.problems}
    assert problems.keys() == found.keys()
    assert all(problems[name].startswith(what) for name, what in found.items())


def test_a_gate_without_experts_is_refused():
    with pytest.raises(CheckpointError, match=r"mlp\.gate\.weight: no such tensor"):
        features(plain_params() | {GATE: np.zeros((1, 12), np.float32)}, random_images(1))


def test_mixtures_are_known_by_their_names():
    assert has_experts(mixture()) and not has_experts(plain_params())
    assert has_experts(["decoder.block.0.layer.2.DenseReluDense.wo.experts.11.b"])
    assert not has_experts(["model.layers.0.mlp.experts.0.gate_proj.weight", "model.layers.0.mlp.gate.weight"])
