"""Weights of any size, results that are not finite, and a caller's own jit: what holds for every rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from merging import CONFIGS

from nufilt_jax import methods
from nufilt_jax.errors import ConfigError, SolveError

Q, FC1 = (f"vision_model.encoder.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.fc1"))
BIAS = "vision_model.encoder.layers.0.mlp.fc1.bias"
DATA_FREE = [name for name, rule in methods.RULES.items() if not rule.needs_data]
HOMOGENEOUS = [name for name in DATA_FREE if name not in ("nufilt", "adapter_only", "wudi")]


def models(scale=1.0, n_tasks=3):
    """Base of zeros, so that a task's change is not lost beside it, and tasks at this scale."""
    rng = np.random.default_rng(0)
    shapes = {Q: (8, 8), FC1: (12, 8), BIAS: (12,)}
    draws = [{name: rng.standard_normal(shape) for name, shape in shapes.items()} for _ in range(n_tasks)]
    tasks = [{name: (scale * x).astype(np.float32) for name, x in draw.items()} for draw in draws]
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, tasks


def config_of(name, scale=1.0):
    config = CONFIGS.get(name)
    if name == "knots":  # whose cut is absolute
        config = dataclasses.replace(config or methods.RULES[name].config(), cutoff=1e-4 * scale)
    return config


def merged(name, scale=1.0, **how):
    base, tasks = models(scale)
    rule = methods.get(name, config_of(name, scale))
    state = rule.init(base)
    for task in tasks:
        state = rule.update(state, task, **how)
    return {key: np.asarray(x, np.float64) / scale for key, x in state.merged.items()}, state


@pytest.mark.parametrize("scale", [2.0**-73, 2.0**63], ids=["1e-22", "1e19"])
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_a_rule_does_not_feel_the_unit_of_the_weights(name, scale):
    found, usual = merged(name, scale)[0], merged(name)[0]
    for key, x in usual.items():
        np.testing.assert_allclose(found[key], x, atol=2e-5 * np.abs(x).max())


@pytest.mark.parametrize("scale", [2.0**-73, 2.0**63], ids=["1e-22", "1e19"])
@pytest.mark.parametrize("name", ["nufilt", "adapter_only", "wudi"])
def test_extreme_weights_are_merged(name, scale):
    """Adam's steps are absolute, so the result is another one: finite, and of the size of the tasks or the steps."""
    found, _ = merged(name, scale)
    for key in (Q, FC1):
        assert np.isfinite(found[key]).all()
        assert np.abs(found[key]).max() > 0.1
        assert np.abs(found[key]).max() < 100 or (name == "wudi" and scale < 1)


@pytest.mark.parametrize("name", DATA_FREE)
def test_a_result_that_is_not_finite_is_refused_by_name(name):
    base, tasks = models(1e37)
    largest = {key: np.full_like(x, np.finfo(np.float32).max) for key, x in tasks[0].items()}
    rule = methods.get(name, config_of(name))
    state = rule.init({key: x.copy() for key, x in base.items()})
    state = dataclasses.replace(state, delta=jax.tree.map(lambda x: np.full_like(x, np.nan), state.delta), step=1)
    state = dataclasses.replace(state, extra=extra_of(name, state))
    with pytest.raises(SolveError, match=r"q_proj\.weight: .*not finite"):
        rule.update(state, largest)


def extra_of(name, state):
    return {"scale": jnp.float32(1), "norms": jnp.float32(1)} if name == "opcm" else state.extra


def test_an_overflow_is_refused_by_name():
    base, tasks = models(3e38 / 4)
    rule = methods.get("sum")
    state = rule.init(base)
    with pytest.raises(SolveError, match=r"q_proj\.weight: .*not finite"):
        for task in [tasks[0]] * 9:
            state = rule.update(state, task)


@pytest.mark.parametrize("name", DATA_FREE)
def test_update_can_be_jitted(name):
    base, tasks = models()
    rule = methods.get(name, config_of(name))
    update = jax.jit(rule.update)
    eager, traced = (jax.tree.map(jnp.asarray, rule.init(base)) for _ in range(2))
    for task in tasks[:2]:
        if name == "knots" and eager.step:
            with pytest.raises(ConfigError, match=r"knots: decomposes on the host and cannot be traced"):
                update(traced, task)
            return
        eager, traced = rule.update(eager, task), update(traced, task)
    assert traced.step == 2
    for key, x in eager.merged.items():
        np.testing.assert_allclose(traced.merged[key], x, atol=1e-5)
    assert traced.report.keys() == eager.report.keys()


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_of_a_later_task_is_refused_by_name(name, bad):
    base, tasks = models()
    tasks[1][Q][3, 2] = bad
    rule = methods.get(name, config_of(name))
    state = rule.update(rule.init(base), tasks[0])
    with pytest.raises(SolveError, match=r"q_proj\.weight: has NaN or infinite numbers"):
        rule.update(state, tasks[1])
