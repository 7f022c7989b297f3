"""Eqs. (3) and (4) on the activations themselves: one token and one layer at a time."""

import numpy as np
import pytest

from nufilt_jax.analysis import losses
from nufilt_jax.analysis.losses import TaskLosses, join, layer_stability, per_step, relative, response, task_losses

LAYERS = {"a": (5, 4), "b": (3, 6)}
STEPS = 3


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in LAYERS.items()}


BASE = draw(0)
MODELS = [{name: x + draw(10 + t, 0.3)[name] for name, x in BASE.items()} for t in range(STEPS)]
MERGED = [{name: x + draw(20 + t, 0.3)[name] for name, x in BASE.items()} for t in range(STEPS)]
TOKENS = [
    {name: np.random.default_rng(30 + t).normal(size=(7, n)) for name, (_, n) in LAYERS.items()} for t in range(STEPS)
]


def mean_square(weights, others, name, task):
    """Mean over tokens of how far two models' answers are apart."""
    total = 0.0
    for x in TOKENS[task][name]:
        difference = weights[name].astype(np.float64) @ x - others[name].astype(np.float64) @ x
        total += float(difference @ difference)
    return total / len(TOKENS[task][name])


def minus_base(model):
    return {name: x - BASE[name] for name, x in model.items()}


@pytest.fixture(scope="module")
def found():
    second = [{name: x.T @ x for name, x in tokens.items()} for tokens in TOKENS]
    how = {"deltas": [minus_base(model) for model in MERGED], "layers": list(LAYERS)}
    return join([task_losses(second[t], 7, step=t, vector=minus_base(MODELS[t]), **how) for t in range(STEPS)])


def test_trace_form_equals_the_loss_on_activations(found):
    for k, name in enumerate(LAYERS):
        for task in range(STEPS):
            assert found.plasticity[task, k] == pytest.approx(
                mean_square(MERGED[task], MODELS[task], name, task), rel=1e-5
            )
            assert found.size[task, k] == pytest.approx(mean_square(MODELS[task], BASE, name, task), rel=1e-5)
            for step in range(STEPS):
                value = found.stability[task, step, k]
                if step <= task:
                    assert np.isnan(value)
                else:
                    wanted = mean_square(MERGED[step], MERGED[step - 1], name, task)
                    assert value == pytest.approx(wanted, rel=1e-5)


def test_a_step_is_judged_by_all_tasks_before_it(found):
    steps = per_step(found)
    names, before = list(LAYERS), {1: [0], 2: [0, 1]}
    for step, tasks in before.items():
        values = [mean_square(MERGED[step], MERGED[step - 1], name, task) for name in names for task in tasks]
        assert steps.stability[step] == pytest.approx(np.mean(values), rel=1e-5)
    assert np.isnan(steps.stability[0]) and np.isnan(steps.harmonic[0])
    own = [np.mean([mean_square(MERGED[t], MODELS[t], name, t) for name in names]) for t in range(STEPS)]
    np.testing.assert_allclose(steps.plasticity, own, rtol=1e-5)
    s, p = steps.stability[1:], steps.plasticity[1:]
    np.testing.assert_allclose(steps.harmonic[1:], 2 / (1 / s + 1 / p))
    assert layer_stability(found).shape == (STEPS, 2)


def test_chosen_layers_alone(found):
    one = per_step(found, np.array([False, True]))
    wanted = [mean_square(MERGED[t], MODELS[t], "b", t) for t in range(STEPS)]
    np.testing.assert_allclose(one.plasticity, wanted, rtol=1e-5)
    assert one.stability[1] == pytest.approx(mean_square(MERGED[1], MERGED[0], "b", 0), rel=1e-5)
    assert np.isnan(per_step(found, np.array([False, False])).plasticity).all()


def test_relative_losses_do_not_depend_on_the_size_of_the_update(found):
    ratio = relative(found)
    np.testing.assert_allclose(ratio.plasticity, found.plasticity / found.size)
    np.testing.assert_allclose(ratio.stability[0, 2], found.stability[0, 2] / found.size[0])
    frozen = relative(found._replace(size=np.zeros_like(found.size)))
    assert np.isnan(frozen.plasticity).all()


def test_nothing_lost_is_zero():
    """A merge that keeps every answer and gives every task its own."""
    x = np.random.default_rng(0).normal(size=(7, 4))
    assert response(np.zeros((5, 4), np.float32), x.T @ x, 7) == 0
    perfect = TaskLosses(np.full((2, 2, 1), np.nan), np.zeros((2, 1)), np.ones((2, 1)))
    perfect.stability[0, 1] = 0
    assert per_step(perfect).harmonic.tolist()[1] == 0


def test_known_mean_leaves_out_what_is_not_known():
    values = np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]])
    np.testing.assert_array_equal(losses.known_mean(values, axis=1), [2, np.nan])
