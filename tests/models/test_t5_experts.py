"""LoRA-WEMoE's feed-forward layers in T5, and the batches that its gates are trained on."""

import jax.numpy as jnp
import numpy as np
import pytest

from nufilt_jax import methods
from nufilt_jax.errors import CheckpointError, ConfigError
from nufilt_jax.evaluation.learning_data import T5_EXAMPLES, t5_task_data
from nufilt_jax.methods.adamerging import AdaMergingConfig
from nufilt_jax.methods.wemoe import WemoeConfig
from nufilt_jax.models import parse_t5_config, t5_logits, t5_shapes

GATED = {
    "model_type": "t5",
    "vocab_size": 11,
    "d_model": 8,
    "d_kv": 3,
    "d_ff": 10,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "relative_attention_num_buckets": 4,
    "relative_attention_max_distance": 6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
PLAIN = GATED | {"feed_forward_proj": "relu"}
BLOCKS = ("encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense")
BIAS = (0.4, -0.7)  # of the gates, one per expert


def base_params(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = t5_shapes(parse_t5_config(config))
    return {name: rng.normal(0.0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def with_experts(config, gate_scale):
    """A T5 with two experts of rank 2 in every feed-forward matrix, and W + Σ g_i B_i A_i for its gates' biases."""
    rng, params = np.random.default_rng(1), base_params(config)
    fixed = dict(params)
    for block in BLOCKS:
        params[f"{block}.gate.weight"] = (gate_scale * rng.normal(size=(2, 8))).astype(np.float32)
        params[f"{block}.gate.bias"] = np.array(BIAS, np.float32)
        for name in [name for name in fixed if name.startswith(block)]:
            m, n = fixed[name].shape
            stem = name.removesuffix(".weight")
            for i, weight in enumerate(BIAS):
                a, b = rng.normal(size=(2, n)).astype(np.float32), rng.normal(size=(m, 2)).astype(np.float32)
                params |= {f"{stem}.experts.{i}.a": a, f"{stem}.experts.{i}.b": b}
                fixed[name] = fixed[name] + np.float32(weight) * (b @ a)
    return params, fixed


def logits(params, config, n_texts=3, seed=2):
    tokens = np.random.default_rng(seed).integers(2, 11, (n_texts, 5))
    start = jnp.zeros((n_texts, 2), jnp.int32)
    return np.asarray(t5_logits(params, jnp.asarray(tokens), jnp.ones((n_texts, 5), jnp.int32), start, config))


@pytest.mark.parametrize("config", [GATED, PLAIN], ids=["gated", "relu"])
def test_gates_that_see_nothing_mix_by_their_biases(config):
    params, fixed = with_experts(config, gate_scale=0)
    np.testing.assert_allclose(logits(params, config), logits(fixed, config), atol=2e-5, rtol=2e-5)
    assert not np.allclose(logits(params, config), logits(base_params(config), config), atol=1e-2)


@pytest.mark.parametrize("config", [GATED, PLAIN], ids=["gated", "relu"])
def test_a_prediction_depends_on_its_batch(config):
    params, fixed = with_experts(config, gate_scale=1)
    together, alone = logits(params, config, n_texts=3)[0], logits(params, config, n_texts=1)[0]
    assert not np.allclose(together, alone, atol=1e-2)
    assert not np.allclose(together, logits(fixed, config)[0], atol=1e-2)
    np.testing.assert_allclose(logits(fixed, config)[0], logits(fixed, config, n_texts=1)[0], atol=1e-5)


def test_experts_that_do_not_fit_are_refused():
    params, _ = with_experts(GATED, gate_scale=1)
    broken = params | {f"{BLOCKS[0]}.wo.experts.1.b": np.zeros((7, 2), np.float32)}
    with pytest.raises(CheckpointError, match=r"wo\.experts\.1\.b: shape is \(7, 2\)"):
        logits(broken, GATED)


def texts(n, seed=3):
    tokens = np.random.default_rng(seed).integers(2, 11, (n, 5))
    return tokens, np.ones_like(tokens)


def test_batches_come_from_a_hundred_texts_drawn_by_seed():
    tokens = np.arange(300)[:, None].repeat(5, 1)
    batches, forward = t5_task_data(tokens, np.ones_like(tokens), GATED, steps=30, batch_size=8, seed=4)
    drawn = [batch["input_ids"][:, 0].tolist() for batch in batches]
    assert [len(rows) for rows in drawn] == [8] * 30
    assert len({row for rows in drawn for row in rows}) == T5_EXAMPLES
    again, same = t5_task_data(tokens, np.ones_like(tokens), GATED, steps=30, batch_size=8, seed=4)
    other, _ = t5_task_data(tokens, np.ones_like(tokens), GATED, steps=30, batch_size=8, seed=5)
    assert forward is same
    assert drawn == [batch["input_ids"][:, 0].tolist() for batch in again]
    assert drawn != [batch["input_ids"][:, 0].tolist() for batch in other]
    with pytest.raises(ConfigError, match=r"input_ids are \[0, 5\]"):
        t5_task_data(tokens[:0], tokens[:0], GATED, steps=1, batch_size=8, seed=4)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("adamerging", AdaMergingConfig(steps=3, entropy="of_mean", learning_rate=1e-2)),
        ("wemoe", WemoeConfig(steps=3, entropy="of_mean", first_rank=3, later_rank=2)),
    ],
)
def test_rules_that_learn_merge_t5(name, config):
    base = base_params(GATED)
    rule = methods.get(name, config)
    state = rule.init(base)
    for step in range(2):
        noise = np.random.default_rng(step)
        task = {k: x + np.float32(0.05) * noise.normal(size=x.shape).astype(np.float32) for k, x in base.items()}
        data = methods.TaskData(*t5_task_data(*texts(20), GATED, steps=3, batch_size=4, seed=step))
        state = rule.update(state, task, data=data)
    merged = state.merged
    assert np.isfinite(logits(merged, GATED)).all()
    assert not np.allclose(logits(merged, GATED), logits(base, GATED), atol=1e-3)
    gates = [key for key in merged if key.endswith("gate.weight")]
    assert sorted(gates) == (sorted(f"{block}.gate.weight" for block in BLOCKS) if name == "wemoe" else [])
    [report] = state.report.values()
    assert report.losses.shape == (3,)
