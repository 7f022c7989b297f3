"""Weights as small as 1e-22 or as large as 1e19, whose squares no float32 holds: a method's result scales with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from merging import BASE, SELECTED, TASKS, Q, change, rule_for
from oracle import nufilt_update
from oracle_closed_form import closed_form_update
from oracle_matrices import wudi

from nufilt_jax import methods
from nufilt_jax.methods import nufilt
from nufilt_jax.methods.knots import KnotsConfig
from nufilt_jax.methods.nufilt import NufiltConfig
from nufilt_jax.methods.wudi import WudiConfig

SMALL, LARGE = 2.0**-73, 2.0**63  # 1.1e-22 and 9.2e18; powers of two, so that scaling the inputs is exact
HOMOGENEOUS = (
    "sum",
    "weight_average",
    "task_arithmetic",
    "ties",
    "magmax",
    "null_space",
    "iso_c",
    "tsv_m",
    "opcm",
    "knots",
)
ADAM = ("nufilt", "adapter_only", "wudi")
EXACT = ("sum", "weight_average", "task_arithmetic", "ties", "magmax")
ZEROS = change(BASE, lambda _, x: np.zeros_like(x))


def vectors(scale):
    return [change(task, lambda name, x: np.float32(scale) * (x - BASE[name])) for task in TASKS]


def merged(name, scale, config=None):
    rule = methods.get(name, config) if config else rule_for(name)
    state = rule.init(ZEROS)
    for vector in vectors(scale):
        state = rule.update(state, vector)
    return state


@functools.cache
def ordinary(name):
    return merged(name, 1.0, KnotsConfig(cutoff=0) if name == "knots" else None)


def test_every_method_without_data_is_here():
    assert {*HOMOGENEOUS, *ADAM} == {name for name, rule in methods.RULES.items() if not rule.needs_data}


@pytest.mark.parametrize("scale", [SMALL, LARGE])
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_the_result_scales_with_the_weights(name, scale):
    config = KnotsConfig(cutoff=0) if name == "knots" else None  # its cut is absolute
    found, wanted = merged(name, scale, config), ordinary(name)
    for key in wanted.delta:
        tolerance = 0 if name in EXACT else 1e-5
        x, y = np.asarray(found.delta[key], np.float64) / scale, np.asarray(wanted.delta[key], np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.linalg.norm(y), err_msg=key)


def test_the_filters_shares_do_not_depend_on_the_scale():
    for scale in (SMALL, LARGE):
        found, wanted = merged("null_space", scale).report, ordinary("null_space").report
        for key in SELECTED:
            np.testing.assert_allclose(found[key].forecast, wanted[key].forecast, rtol=1e-3, atol=1e-9)
            assert 0 < found[key].forecast.removed_share < 1 and 0 < found[key].forecast.captured < 1


@pytest.mark.parametrize("solver", ["adam", "closed_form"])
@pytest.mark.parametrize("scale", [SMALL, 1e-8, 100.0, LARGE])
def test_nufilt_equals_the_oracle_at_every_scale(scale, solver):
    """Adam's steps are absolute: beside its ε small weights train nothing, and large ones train alike."""
    ranks = {"filter_rank": 8, "task_rank": 3}
    config = NufiltConfig(**ranks, adapter_rank=4, steps=10, solver=solver)
    state = merged("nufilt", scale, config)
    for key in SELECTED[:3]:
        d, *rest = (np.asarray(vector[key], np.float64) for vector in vectors(scale))
        for step, tau in enumerate(rest, 2):
            if solver == "adam":
                start = nufilt.normal_start(jnp.asarray(nufilt.adapter_keys(0, step, (key,))[0]), 4, d.shape[1])
                update, losses = nufilt_update(d, tau, start, **ranks, steps=10)
            else:
                update, losses = closed_form_update(d, tau, **ranks, ridge=1.0)
            d = d + update
        assert np.linalg.norm(state.delta[key] - d) < 5e-5 * np.linalg.norm(d)
        fits = losses < np.finfo(np.float32).max
        np.testing.assert_allclose(np.asarray(state.report[key].losses)[fits], losses[fits], rtol=1e-4, atol=1e-37)
        assert not np.isnan(state.report[key].losses).any()


@pytest.mark.parametrize("scale", [1e10, LARGE])
def test_wudi_equals_the_oracle_where_weights_are_large(scale):
    config = WudiConfig(steps=10)
    rule = methods.get("wudi", config)
    first, second = vectors(scale)[:2]
    state = rule.update(rule.update(rule.init(ZEROS), first), second)
    name = Q.format(0)
    wanted, _ = wudi(first[name], second[name], steps=10, learning_rate=config.learning_rate)
    assert np.linalg.norm(state.delta[name] - wanted) < 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("scale", [SMALL, LARGE])
@pytest.mark.parametrize("name", ADAM)
def test_what_adam_makes_is_finite(name, scale):
    for x in jax.tree.leaves(merged(name, scale).delta):
        assert np.isfinite(x).all() and np.any(x != 0)
