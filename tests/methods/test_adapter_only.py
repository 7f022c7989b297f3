import dataclasses

import jax.numpy as jnp
import numpy as np
import oracle
import oracle_adapter_only
import pytest

from nufilt_jax import methods
from nufilt_jax.methods import nufilt
from nufilt_jax.methods.adapter_only import AdapterOnlyConfig
from nufilt_jax.methods.nufilt import NufiltConfig

BLOCK = "vision_model.encoder.layers.0."
Q, OUT, FC1, FC2 = (
    f"{BLOCK}{name}.weight" for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
)
BIAS, NORM = f"{BLOCK}mlp.fc1.bias", f"{BLOCK}layer_norm1.weight"
POSITION, PATCH = "vision_model.embeddings.position_embedding.weight", "vision_model.embeddings.patch_embedding.weight"
SHAPES = {
    **{Q: (12, 12), OUT: (1, 12), FC1: (20, 12), FC2: (12, 20)},
    **{BIAS: (20,), NORM: (12,), POSITION: (5, 12), PATCH: (12, 3, 2, 2)},
}
SELECTED = {Q, OUT, FC1}
RANKS = {"filter_rank": 4, "task_rank": 3}
CONFIG = AdapterOnlyConfig(**RANKS, adapter_rank=3, steps=8, decomposition="svd")
VARIANTS = ("code", "text")


def model(seed, base=None):
    rng = np.random.default_rng(seed)
    if base is None:
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return {name: (x + 0.2 * rng.normal(size=x.shape)).astype(np.float32) for name, x in base.items()}


BASE = model(0)
TASKS = [model(seed, BASE) for seed in (1, 2, 3)]
LORA = [
    {
        name: x if x.ndim != 2 else BASE[name] + np.outer(x[:, 0], x[0]).astype(np.float32) / 9
        for name, x in task.items()
    }
    for task in TASKS
]


def rule_for(variant, **changes):
    return methods.get("adapter_only", dataclasses.replace(CONFIG, variant=variant, **changes))


def merge(rule, tasks, base=BASE):
    state = rule.init(base)
    for task in tasks:
        state = rule.update(state, task)
    return state


def start_of(name, step, rank=3):
    [key] = nufilt.adapter_keys(0, step, (name,))
    return nufilt.normal_start(jnp.asarray(key), rank, SHAPES[name][1])


@pytest.mark.parametrize("tasks", [TASKS, LORA], ids=["full rank", "rank 1"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_three_tasks_equal_the_oracle(variant, tasks):
    state = merge(rule_for(variant), tasks)
    assert set(state.delta) == SELECTED
    for name in SELECTED:
        d = (tasks[0][name] - BASE[name]).astype(np.float64)
        for step, task in enumerate(tasks[1:], 2):
            tau = (task[name] - BASE[name]).astype(np.float64)
            change, losses = oracle_adapter_only.update(variant, d, tau, start_of(name, step), **RANKS, steps=8)
            d = d + change
        # As the parity of the solve itself: float32 against float64, over two steps.
        assert np.linalg.norm(state.delta[name] - d) < 5e-5 * np.linalg.norm(d)
        np.testing.assert_allclose(state.report[name].losses, losses, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_task_is_taken_as_it_is_and_reports_nothing(variant):
    state = merge(rule_for(variant), TASKS[:1])
    for name in SELECTED:
        np.testing.assert_array_equal(state.delta[name], TASKS[0][name] - BASE[name])
    assert state.report == {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_not_selected_neither_moves_nor_matters(variant):
    rule = rule_for(variant)
    state = merge(rule, TASKS[:2])
    for name in SHAPES:
        other = merge(rule, [TASKS[0], TASKS[1] | {name: TASKS[1][name] + np.float32(0.1)}])
        moved = {key for key in SHAPES if not np.array_equal(other.merged[key], state.merged[key])}
        assert moved == {name} & SELECTED
    for name in SHAPES.keys() - SELECTED:
        np.testing.assert_array_equal(state.merged[name], BASE[name])


def test_without_earlier_directions_it_is_nufilt():
    """r_p = 0: P is the identity, and the loss has no second block in either."""
    fields = {key: value for key, value in dataclasses.asdict(CONFIG).items() if key != "variant"}
    full = methods.get("nufilt", NufiltConfig(**fields | {"filter_rank": 0}))
    ours, theirs = merge(rule_for("code", filter_rank=0), TASKS[:2]), merge(full, TASKS[:2])
    for name in SELECTED:
        np.testing.assert_allclose(ours.delta[name], theirs.delta[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_an_adapter_the_code_sums_and_the_text_stands_still(variant):
    state = merge(rule_for(variant, adapter_rank=0), TASKS[:2])
    for name in SELECTED:
        first, second = (task[name] - BASE[name] for task in TASKS[:2])
        np.testing.assert_array_equal(state.delta[name], first + second if variant == "code" else first)
        assert state.report[name].losses is None


def test_variants_differ_by_more_than_the_task_vector():
    """The two losses pull the adapter to different places; what the text adds has the adapter's rank."""
    states = {variant: merge(rule_for(variant), TASKS[:2]) for variant in VARIANTS}
    for name in (Q, FC1):
        first, tau = TASKS[0][name] - BASE[name], TASKS[1][name] - BASE[name]
        change = {variant: np.asarray(state.delta[name]) - first for variant, state in states.items()}
        apart = change["code"] - change["text"] - tau
        assert np.linalg.norm(apart) > 0.1 * np.linalg.norm(change["text"])
        s = np.linalg.svd(change["text"], compute_uv=False)
        assert s[3] < 1e-4 * s[0] < s[2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_tasks_that_learned_nothing_leave_everything(variant):
    rule = rule_for(variant)
    after_nothing = merge(rule, [TASKS[0], BASE])
    beside_nothing = merge(rule, [BASE, TASKS[0]])
    for name in SELECTED:
        tau = TASKS[0][name] - BASE[name]
        np.testing.assert_array_equal(after_nothing.delta[name], tau)
        if variant == "code":  # nothing is missing, so that B stays zero
            np.testing.assert_array_equal(beside_nothing.delta[name], tau)
            assert beside_nothing.report[name].forecast.captured == 1
        assert np.isfinite(beside_nothing.delta[name]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forecast_says_what_the_step_did(variant):
    rule = rule_for(variant)
    first = merge(rule, TASKS[:1])
    second = rule.update(first, TASKS[1])
    for name in SELECTED:
        d, tau = np.asarray(first.delta[name]), TASKS[1][name] - BASE[name]
        v2, change, row = oracle.leading(d, 4), np.asarray(second.delta[name]) - d, second.report[name]
        restored = change - tau if variant == "code" else change
        assert row.forecast.removed_share == 0
        assert float(row.forecast.restored_share) == pytest.approx(np.sum(restored**2) / np.sum(tau**2), rel=1e-3)
        assert float(row.forecast.drift) == pytest.approx(np.sum((change @ v2) ** 2) / np.sum((d @ v2) ** 2), rel=1e-3)
        assert float(row.forecast.captured) == pytest.approx(np.sum((d @ v2) ** 2) / np.sum(d**2), rel=1e-5)
        assert row.losses[-1] < row.losses[0]


def test_the_second_task_compiles_nothing():
    rule = rule_for("code")
    state = merge(rule, TASKS[:2])
    before = nufilt._step._cache_size()
    rule.update(rule.update(state, TASKS[2]), TASKS[0])
    assert nufilt._step._cache_size() == before
