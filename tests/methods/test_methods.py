import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from merging import BASE, BIAS, CONFIGS, FC1, FC2, POSITION, RANKS, SELECTED, TASKS, Q, merge, moved, rule_for

from nufilt_jax import methods
from nufilt_jax.errors import CheckpointError, ConfigError
from nufilt_jax.methods import nufilt
from nufilt_jax.methods.nufilt import NufiltConfig
from nufilt_jax.methods.selection import select
from nufilt_jax.methods.sum import SumConfig
from nufilt_jax.methods.task_arithmetic import TaskArithmeticConfig


def test_closed_forms():
    mean = {k: np.mean([t[k] for t in TASKS], axis=0) for k in BASE}
    vectors = {k: sum(t[k] - BASE[k] for t in TASKS) for k in BASE}
    for key in (Q.format(0), BIAS.format(1), POSITION):
        np.testing.assert_allclose(merge("weight_average").merged[key], mean[key], atol=1e-6)
        np.testing.assert_allclose(merge("task_arithmetic").merged[key], BASE[key] + 0.4 * vectors[key], atol=1e-6)
    np.testing.assert_allclose(merge("sum").merged[Q.format(0)], (BASE[Q.format(0)] + vectors[Q.format(0)]), atol=1e-6)


def test_nufilt_is_algorithm_1():
    """Three tasks against the oracle: θ^m_1 = θ_1, then filter, adapt, fuse with the very same starts."""
    state = merge("nufilt")
    for name in SELECTED:
        d = (TASKS[0][name] - BASE[name]).astype(np.float64)
        for step, task in enumerate(TASKS[1:], 2):
            key = nufilt.adapter_keys(0, step, (name,))[0]
            start = nufilt.normal_start(jnp.asarray(key), 4, d.shape[1])
            d = d + oracle.nufilt_update(d, task[name] - BASE[name], start, filter_rank=8, task_rank=3, steps=10)[0]
        assert np.linalg.norm(state.delta[name] - d) < 5e-5 * np.linalg.norm(d)


def test_null_space_keeps_the_answers_of_earlier_tasks():
    rule = rule_for("null_space")
    first = rule.update(rule.init(BASE), TASKS[0])
    second = rule.update(first, TASKS[1])
    for name in SELECTED:
        change = np.asarray(second.delta[name]) - np.asarray(first.delta[name])
        assert np.abs(change @ oracle.leading(np.asarray(first.delta[name]), 8)).max() < 1e-5
        assert second.report[name].losses is None


@pytest.mark.parametrize("name", ["nufilt", "null_space"])
def test_the_first_task_is_taken_as_it_is_or_as_the_authors_do(name):
    config = CONFIGS[name]
    paper = merge(name, TASKS[:1]).merged
    rule = methods.get(name, dataclasses.replace(config, first_task="authors"))
    authors = rule.update(rule.init(BASE), TASKS[0]).merged
    for key in SELECTED:
        np.testing.assert_allclose(paper[key], TASKS[0][key], atol=1e-6)
        np.testing.assert_array_equal(authors[key][:, :8], BASE[key][:, :8])
        np.testing.assert_allclose(authors[key][:, 8:], TASKS[0][key][:, 8:], atol=1e-6)


@pytest.mark.parametrize("name", ["nufilt", "null_space", "sum"])
def test_only_selected_layers_move_unless_asked(name):
    everything = {key for key, x in BASE.items() if x.dtype == np.float32}
    assert moved(merge(name)) == set(SELECTED)
    averaged, first = merge(name, other_params="average"), merge(name, other_params="first")
    assert moved(averaged) == moved(first) == everything
    np.testing.assert_allclose(averaged.merged[FC2.format(0)], np.mean([t[FC2.format(0)] for t in TASKS], 0), atol=1e-6)
    np.testing.assert_allclose(first.merged[POSITION], TASKS[0][POSITION], atol=1e-6)


def test_clip_models_are_touched_in_the_vision_tower_only():
    text = {"text_model.encoder.layers.0.self_attn.q_proj.weight": np.zeros((8, 8), np.float32)}
    whole = text | BASE | {"logit_scale": np.zeros((), np.float32), "visual_projection.weight": BASE[Q.format(0)]}
    for name in methods.RULES:
        assert all(key.startswith("vision_model.") for key in merge(name, base=whole, layers=None).delta)
    assert all(key.startswith("vision_model.") for key in merge("nufilt", base=whole, layers="q_proj").delta)


T5 = [
    "encoder.block.0.layer.0.SelfAttention.q",
    "encoder.block.0.layer.1.DenseReluDense.wi_0",
    "decoder.block.3.layer.1.EncDecAttention.o",
    "decoder.block.3.layer.2.DenseReluDense.wo",
]
T5_LEFT = ["shared", "lm_head", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"]
LLAVA = [
    "language_model.model.layers.0.self_attn.o_proj",
    "language_model.model.layers.30.mlp.down_proj",
    "language_model.model.layers.1.mlp.gate_proj",
]
LLAVA_LEFT = [
    "language_model.lm_head",
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    "multi_modal_projector.linear_1",
    "language_model.model.embed_tokens",
]


@pytest.mark.parametrize(("chosen", "left"), [(T5, T5_LEFT), (LLAVA, LLAVA_LEFT)], ids=["t5", "llava"])
def test_published_layers(chosen, left):
    params = {f"{name}.weight": np.zeros((2, 2), np.float32) for name in chosen + left}
    assert set(select(params).layers) == {f"{name}.weight" for name in chosen}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "no_such_layer"}, "layers: no matrix matches 'no_such_layer'"),
        ({"layers": "(q_proj"}, "is no regular expression"),
    ],
)
def test_a_selection_of_nothing_is_refused(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        select(BASE, **options)
    heads = {f"head.{name}.weight": np.zeros((2, 2), np.float32) for name in "ab"}
    with pytest.raises(ConfigError) as refusal:
        select(heads)
    text = str(refusal.value)
    assert "no matrix of this model is in a numbered block" in text and "head.{a,b} (2)" in text
    expression = text.split("layers '")[1].split("'")[0]
    assert set(select(heads, layers=expression).layers) == heads.keys()


def test_a_method_that_finds_none_of_its_tensors_says_so():
    """Though matrices stand in numbered blocks: of a model that wemoe is not for, and of a CLIP that is cut short."""
    names = ("model.layers.0.self_attn.q_proj.weight", "vision_model.encoder.layers.0.mlp.fc2.weight")
    for name, scope in zip(names, (methods.find("wemoe").scope, methods.find("nufilt").scope), strict=True):
        with pytest.raises(ConfigError, match="has none of the tensors that the method chooses by itself") as refusal:
            select({name: np.zeros((2, 2), np.float32)}, scope=scope)
        assert "numbered block" not in str(refusal.value)


def test_starts_depend_on_seed_step_and_name_alone():
    keys = nufilt.adapter_keys(0, 2, ("a", "b"))
    np.testing.assert_array_equal(keys[1], nufilt.adapter_keys(0, 2, ("b",))[0])
    others = [nufilt.adapter_keys(1, 2, ("b",)), nufilt.adapter_keys(0, 3, ("b",)), keys[:1]]
    assert len({tuple(k[0]) for k in [*others, keys[1:]]}) == 4
    assert not np.array_equal(merge("nufilt").merged[SELECTED[0]], merge("nufilt", seed=1).merged[SELECTED[0]])


def test_the_layers_merged_beside_it_do_not_change_a_layer():
    alone = merge("nufilt", layers=re.escape(SELECTED[0])).merged[SELECTED[0]]
    np.testing.assert_allclose(merge("nufilt").merged[SELECTED[0]], alone, atol=1e-6)


def test_the_second_task_compiles_nothing():
    rule = methods.get("nufilt", NufiltConfig(**RANKS, steps=4))
    state = rule.update(rule.update(rule.init(BASE), TASKS[0]), TASKS[1])
    before = nufilt._step._cache_size()
    rule.update(rule.update(state, TASKS[2]), TASKS[0])
    assert nufilt._step._cache_size() == before


def test_progress_tells_of_every_group():
    told = []
    rule = rule_for("nufilt")
    state = rule.update(rule.init(BASE), TASKS[0], on_stack=lambda *news: told.append(news))
    assert told == []
    rule.update(state, TASKS[1], on_stack=lambda *news: told.append(news))
    [(text, report)] = told
    assert text == "10 layers of width 32"
    assert report.losses.shape == (10, 11)


def test_the_forecast_says_what_the_step_did():
    rule = rule_for("nufilt")
    first = rule.update(rule.init(BASE), TASKS[0])
    second = rule.update(first, TASKS[1])
    for name in SELECTED:
        d, tau = np.asarray(first.delta[name]), TASKS[1][name] - BASE[name]
        v2, change, row = oracle.leading(d, 8), np.asarray(second.delta[name]) - d, second.report[name]
        restored = change - tau @ oracle.projector(d, 8)
        assert float(row.forecast.removed_share) == pytest.approx(np.sum((tau @ v2) ** 2) / np.sum(tau**2), rel=1e-3)
        assert float(row.forecast.restored_share) == pytest.approx(np.sum(restored**2) / np.sum(tau**2), rel=1e-3)
        assert float(row.forecast.drift) == pytest.approx(np.sum((change @ v2) ** 2) / np.sum((d @ v2) ** 2), rel=1e-3)


def test_misfitting_tasks_are_refused_with_every_tensor():
    broken = {k: x for k, x in TASKS[0].items() if k != Q.format(0)} | {FC1.format(1): np.zeros((3, 32), np.float32)}
    rule = rule_for("sum")
    with pytest.raises(CheckpointError) as error:
        rule.update(rule.init(BASE), broken)
    assert {problem.tensor for problem in error.value.problems} == {FC1.format(1), Q.format(0)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: methods.get("nufilter"), "method: 'nufilter' is not known"),
        (lambda: methods.get("nufilt", SumConfig()), "nufilt takes a NufiltConfig, got a SumConfig"),
        (lambda: methods.get("sum", other_params="none"), "other_params must be one of pretrained, first, average"),
        (lambda: NufiltConfig(filter_rank=-1), "filter_rank must be at least 0, got -1"),
        (lambda: NufiltConfig(steps=2.5), "steps must be a whole number, got 2.5"),
        (lambda: NufiltConfig(learning_rate=0), "learning_rate must be above 0, got 0"),
        (lambda: NufiltConfig(decomposition="qr"), "decomposition must be one of auto, eigh, svd, subspace"),
        (lambda: TaskArithmeticConfig(scale=float("nan")), "scale must be a finite number, got nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(call, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        call()


def test_all_bad_settings_are_listed_at_once():
    with pytest.raises(ConfigError) as error:
        NufiltConfig(filter_rank=-1, task_rank=-2, steps=True)
    assert len(error.value.problems) == 3


@pytest.mark.parametrize("layers", [None, "layer1"])
def test_a_model_of_convolutions_is_told_of_conv(layers):
    kernels = {f"layer1.{i}.conv{j}.weight": np.zeros((4, 4, 3, 3), np.float32) for i in (0, 1) for j in (1, 2)}
    model = kernels | {"fc.weight": np.zeros((3, 4), np.float32)}
    with pytest.raises(ConfigError, match=r"its kernels of convolutions are .*; to merge these: conv") as caught:
        select(model, layers=layers)
    assert "layer1.*.{conv1,conv2} (4)" in str(caught.value)
    assert select(model, layers=layers, conv=True).layers == tuple(f"{name}[:]" for name in sorted(kernels))
