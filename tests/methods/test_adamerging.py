import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle_adaptation as oracle
import pytest

from nufilt_jax import methods
from nufilt_jax.errors import ConfigError, SolveError
from nufilt_jax.methods import adamerging, adaptation
from nufilt_jax.methods.adamerging import AdaMergingConfig
from nufilt_jax.methods.stacked import stack_names, task_vector

SHAPES = {"head.weight": (4, 6), "head.bias": (4,), "gain": (6,)}


def model(seed, base=None):
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    if base is not None:
        params = {name: base[name] + np.float32(0.3) * x for name, x in params.items()}
    return params | {"position_ids": np.arange(3)}


BASE = model(0)
TASKS = [model(seed, BASE) for seed in (1, 2, 3)]


def forward(params, batch):
    hidden = batch * params["gain"][None]
    return jnp.matmul(hidden, params["head.weight"].T, precision="highest") + params["head.bias"][None]


def undecided(params, batch):
    return jnp.zeros((len(batch), 4)) + 0 * params["gain"][0]


def batches(n_steps, seed=9):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(5, 6)).astype(np.float32) for _ in range(n_steps)]


def merge(config, tasks=TASKS, answer=forward, base=BASE, **options):
    rule = methods.get("adamerging", config)
    state = rule.init(base)
    for index, task in enumerate(tasks):
        state = rule.update(state, task, data=methods.TaskData(iter(batches(config.steps, index)), answer), **options)
    return state


def assert_close(actual, wanted, rtol=1e-5):
    for name in SHAPES:
        np.testing.assert_allclose(actual[name], wanted[name], rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize("kind", ["of_each", "of_mean"])
@pytest.mark.parametrize("variant", ["code", "text"])
@pytest.mark.parametrize("init", [0.3, 0.99])  # the second crosses 1 and stops there
def test_it_is_the_published_rule(variant, kind, init):
    config = AdaMergingConfig(init=init, learning_rate=0.01, steps=12, variant=variant, entropy=kind)
    state = merge(config)
    base, *tasks = ({n: m[n].astype(np.float64) for n in SHAPES} for m in (BASE, *TASKS))
    delta = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for index, task in enumerate(tasks):
        steps = [x.astype(np.float64) for x in batches(12, index)]
        accumulate = variant == "text"
        delta, losses = oracle.adamerging(
            base, delta, task, steps, init=init, learning_rate=0.01, kind=kind, accumulate=accumulate
        )
    # c moves by 0.01 a step whatever the gradient's size: float32 decides its sign only where it is next to zero.
    assert_close(state.delta, delta, rtol=1e-4)
    np.testing.assert_allclose(state.report["model"].losses, losses, rtol=1e-4)


@pytest.mark.parametrize("variant", ["code", "text"])
def test_without_steps_it_is_task_arithmetic(variant):
    state = merge(AdaMergingConfig(steps=0, variant=variant))
    merged = TASKS[-1:] if variant == "code" else TASKS
    assert_close(state.merged, {n: BASE[n] + 0.3 * sum(task[n] - BASE[n] for task in merged) for n in SHAPES})
    assert state.report["model"].losses is None


def test_only_the_text_variant_remembers():
    for variant, forgets in (("code", True), ("text", False)):
        config = AdaMergingConfig(steps=3, variant=variant)
        one, other = (merge(config, [first, TASKS[0]]).merged for first in TASKS[1:])
        assert all(np.array_equal(one[name], other[name]) == forgets for name in SHAPES)


def test_an_undecided_model_leaves_the_coefficients():
    state = merge(AdaMergingConfig(steps=5), TASKS[:1], undecided)
    assert_close(state.merged, {name: BASE[name] + np.float32(0.3) * (TASKS[0][name] - BASE[name]) for name in SHAPES})
    np.testing.assert_allclose(state.report["model"].losses, np.log(4), rtol=1e-6)


@pytest.mark.parametrize("keeps", [False, True])
def test_gradient_of_a_coefficient(keeps):
    """∂loss/∂c_j = ⟨∂loss/∂θ_j, τ_j⟩ inside [0, 1], and 0 outside."""
    names = stack_names(SHAPES, SHAPES)
    tau = task_vector(BASE, TASKS[0], names)
    kept = task_vector(BASE, TASKS[1], names) if keeps else None
    base = adaptation.model_params(BASE)
    [x] = batches(1)

    def loss(params):
        return adaptation.entropy(forward(params, x), "of_each")

    for values in ([-0.2, 0.5, 1.3], [0.7, 1.1, 0.1], [0.2, 0.9, -1.0]):
        c = tuple(jnp.full(1, value) for value in values)
        slopes = jax.grad(lambda c: loss(adamerging._params(c, (base, kept, tau))))(c)
        inner = jax.grad(loss)(adamerging._params(c, (base, kept, tau)))
        for [name], value, slope in zip(names, values, slopes, strict=True):
            wanted = np.sum(np.asarray(inner[name]) * np.asarray(tau[name])) * (0 < value < 1)
            np.testing.assert_allclose(slope[0], wanted, rtol=1e-5)
            assert (float(slope[0]) != 0) == (0 < value < 1)


def test_coefficients_stay_near_their_start():
    config = AdaMergingConfig(learning_rate=1e-3, steps=20)
    state = merge(config, TASKS[:1])
    for name in SHAPES:
        tau = TASKS[0][name] - BASE[name]
        c = np.sum(np.asarray(state.delta[name]) * tau) / np.sum(tau**2)
        np.testing.assert_allclose(state.delta[name], c * tau, atol=1e-6)  # one coefficient per tensor
        assert 1e-4 < abs(c - 0.3) < 3.2 * 1e-3 * 20


def test_every_tensor_is_touched_on_its_own():
    config = AdaMergingConfig(steps=2)
    before = merge(config, TASKS[:1], undecided).merged
    for name in SHAPES:
        task = TASKS[0] | {name: TASKS[0][name] + np.float32(1)}
        after = merge(config, [task], undecided).merged
        assert {other for other in BASE if not np.array_equal(before[other], after[other])} == {name}


def test_bfloat16_models_are_run_in_float32():
    """θ(c) is never rounded while it is trained: the losses are those of the float32 model of the same numbers."""
    half = {name: x.astype(jnp.bfloat16) if name in SHAPES else x for name, x in BASE.items()}
    wide = {name: x.astype(np.float32) if name in SHAPES else x for name, x in half.items()}
    config = AdaMergingConfig(steps=3)
    one, other = merge(config, TASKS[:1], base=half), merge(config, TASKS[:1], base=wide)
    np.testing.assert_array_equal(one.report["model"].losses, other.report["model"].losses)
    assert one.merged["gain"].dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["of_each", "of_mean"])
def test_entropy(kind):
    rng = np.random.default_rng(3)
    logits = np.concatenate([rng.normal(0, 3, (6, 5)), [[80.0, 0, 0, 0, 0], [0.0] * 5]])
    value, slope = jax.value_and_grad(adaptation.entropy)(jnp.asarray(logits, jnp.float32), kind)
    wanted, wanted_slope = oracle.entropy(logits, kind)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(slope, wanted_slope, atol=1e-6)


@pytest.mark.parametrize("kind", ["of_each", "of_mean"])
def test_what_is_no_class_adds_nothing(kind):
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(6, 5)), jnp.float32)
    padded = jnp.concatenate([logits, jnp.full((6, 3), -jnp.inf)], axis=1)
    (one, slope), (other, padded_slope) = (jax.value_and_grad(adaptation.entropy)(x, kind) for x in (logits, padded))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    np.testing.assert_allclose(padded_slope, np.pad(slope, ((0, 0), (0, 3))), atol=1e-7)


def test_models_that_learned_nothing_leave_the_base():
    state = merge(AdaMergingConfig(steps=3), [BASE] * 2)
    assert all(np.array_equal(state.merged[name], BASE[name]) for name in BASE)


def test_one_program_for_all_tasks():
    config = AdaMergingConfig(steps=2, learning_rate=0.0123)
    before = adaptation._step._cache_size(), adamerging._moved._cache_size()
    merge(config, TASKS[:1])
    after = adaptation._step._cache_size(), adamerging._moved._cache_size()
    assert after[0] == before[0] + 1  # the learning rate is one that no other test has
    merge(config)
    assert (adaptation._step._cache_size(), adamerging._moved._cache_size()) == after


def test_progress_tells_of_the_losses():
    told = []
    merge(AdaMergingConfig(steps=4), TASKS[:1], on_stack=lambda *news: told.append(news))
    [(text, report)] = told
    assert text == "3 coefficients"
    assert report.losses.shape == (1, 4)


def test_examples_are_needed_for_every_step():
    config = AdaMergingConfig(steps=3)
    rule = methods.get("adamerging", config)
    with pytest.raises(ConfigError, match="data: adamerging needs examples of each task"):
        rule.update(rule.init(BASE), TASKS[0])
    with pytest.raises(ConfigError, match=re.escape("data: there are 2 batches for 3 steps (give one for every step)")):
        rule.update(rule.init(BASE), TASKS[0], data=methods.TaskData(iter(batches(2)), forward))


def test_no_more_batches_are_taken_than_there_are_steps():
    supply = iter(batches(5))
    rule = methods.get("adamerging", AdaMergingConfig(steps=3))
    rule.update(rule.init(BASE), TASKS[0], data=methods.TaskData(supply, forward))
    assert len(list(supply)) == 2


def test_a_loss_that_is_not_finite_is_an_error():
    broken = methods.TaskData(iter([x * np.nan for x in batches(2)]), forward)
    rule = methods.get("adamerging", AdaMergingConfig(steps=2))
    with pytest.raises(SolveError, match="entropy of the model's predictions is not finite"):
        rule.update(rule.init(BASE), TASKS[0], data=broken)
