import functools

import chex
import jax
import jax.numpy as jnp
import matrices
import numpy as np
import oracle
import oracle_closed_form as exact
import pytest

from nufilt_jax import NufiltConfig, solve_layer, solve_stack
from nufilt_jax.core import layers, solve
from nufilt_jax.core.closed_form import blended_inverse, smallest_correction
from nufilt_jax.errors import ConfigError
from nufilt_jax.linalg.dispatch import run_alone

PARITY = 5e-5  # float32 against float64, as for Adam's solutions
RANKS = {"filter_rank": 12, "task_rank": 4}
SHAPE = (60, 48)


def config_for(**changes):
    """By the route that compiles fastest."""
    return NufiltConfig(**{**RANKS, "solver": "closed_form", "decomposition": "svd", **changes})


def pair(shape=SHAPE, ranks=(None, None), scale=0.02):
    """D and τ."""
    return tuple(
        matrices.power_law(shape, seed=seed, rank=rank, scale=scale) for seed, rank in zip((1, 2), ranks, strict=True)
    )


def solved(pairs, config):
    """The whole solution of layers of one shape, forecast included."""
    d, tau = (jnp.stack([jnp.asarray(x) for x in side]) for side in zip(*pairs, strict=True))
    program = functools.partial(layers._solve_group, config=config)
    return run_alone(program, (d,), (tau,), jnp.zeros((len(d), 0, d.shape[2])))


def update_of(d, tau, config):
    return np.asarray(solved([(d, tau)], config).updates[0][0], np.float64)


def check_against_oracle(pairs, config):
    found = solved(pairs, config)
    assert np.all(found.ok)
    assert found.losses.shape == (len(pairs), 2)
    for (d, tau), update, losses in zip(pairs, found.updates[0], found.losses, strict=True):
        ranks = {"filter_rank": config.filter_rank, "task_rank": config.task_rank}
        expected, surrogates = exact.closed_form_update(d, tau, **ranks, ridge=config.ridge)
        size = np.linalg.norm(tau) + np.linalg.norm(d)
        # Relative to the update, unless nearly all of τ is taken away.
        atol = PARITY * max(np.linalg.norm(expected), 1e-2 * size)
        np.testing.assert_allclose(update, expected, rtol=0, atol=atol)
        np.testing.assert_allclose(losses, surrogates, rtol=0, atol=PARITY * surrogates[0] + 1e-8 * size**2)


@pytest.mark.parametrize(
    ("shape", "ridge"),
    [(SHAPE, 1.0), (SHAPE, 1e-3), (SHAPE, 30.0), ((20, 96), 0.1), ((1, 20), 1.0)],
    ids=str,
)
def test_update_and_losses_equal_the_oracle(shape, ridge):
    check_against_oracle([pair(shape)], config_for(ridge=ridge))


def test_low_rank_inputs_equal_the_oracle():
    """As LoRA makes them, or frozen layers: D = 0 takes nothing away, τ = 0 gives nothing."""
    ranks = [(3, 3), (3, None), (None, 3), (0, None), (None, 0), (0, 0), (16, 16)]
    check_against_oracle([pair(ranks=case) for case in ranks], config_for(ridge=0.01))


def test_layers_no_wider_than_the_filter_equal_the_oracle():
    """The filter takes every direction that D uses. Where these are all n, nothing is left to correct."""
    for shape in ((40, 12), (5, 10)):
        check_against_oracle([pair(shape)], config_for(ridge=1e-3))
    d, tau = pair((40, 12))
    assert np.linalg.norm(update_of(d, tau, config_for(ridge=1e-3))) < 1e-5 * np.linalg.norm(tau)


def by_null_space(d, tau):
    """Row 2 of Table 4, τ P."""
    return update_of(d, tau, NufiltConfig(filter_rank=12, adapter_rank=0, task_rank=0, steps=0, decomposition="svd"))


def test_rank_zero_of_directions_is_legal():
    d, tau = pair()
    check_against_oracle([(d, tau)], config_for(filter_rank=0))
    check_against_oracle([(d, tau)], config_for(task_rank=0))
    np.testing.assert_array_equal(update_of(d, tau, config_for(task_rank=0)), by_null_space(d, tau))


def test_a_large_ridge_leaves_the_filter_alone():
    d, tau = pair()
    found = solved([(d, tau)], config_for(ridge=1e38))
    np.testing.assert_allclose(found.updates[0][0], by_null_space(d, tau), rtol=0, atol=1e-8)
    assert float(found.losses[0, 1]) == pytest.approx(float(found.losses[0, 0]), rel=1e-6)


def test_a_smaller_ridge_leaves_less_of_the_loss_and_the_least_nothing():
    d, tau = pair()
    v1, v2 = oracle.leading(tau, 4), oracle.leading(d, 12)
    for ridge in (30.0, 1.0, 1e-3):
        found = solved([(d, tau)], config_for(ridge=ridge))
        before, after = found.losses[0].tolist()
        update = np.asarray(found.updates[0][0], np.float64)
        assert after == pytest.approx(exact.surrogate(d, tau, update, v1, v2), rel=1e-3, abs=1e-12)
        cosines = np.linalg.eigvalsh(v1.T @ oracle.projector(d, 12) @ v1)
        assert (ridge / (ridge + cosines[-1])) ** 2 <= after / before <= (ridge / (ridge + cosines[0])) ** 2


def test_earlier_directions_stay_untouched():
    for shape, ridge in ((SHAPE, 1.0), ((20, 96), 0.1)):
        d, tau = pair(shape)
        touched = update_of(d, tau, config_for(ridge=ridge)) @ oracle.leading(d, 12)
        assert np.abs(touched).max() < 48 * oracle.EPS * np.linalg.norm(tau, 2)


def test_scaling_both_scales_the_update():
    """Unlike Adam's steps, which are absolute."""
    d, tau = pair()
    once, often = (update_of(c * d, c * tau, config_for()) for c in (1, 8))
    np.testing.assert_allclose(often, 8 * once, rtol=0, atol=1e-5 * np.abs(often).max())


def test_left_rotation_rotates_the_update():
    d, tau = pair()
    q = matrices.orthonormal(np.random.default_rng(5), 60, 60).astype(np.float32)
    plain, rotated = (update_of(*arrays, config_for()) for arrays in ((d, tau), (q @ d, q @ tau)))
    assert matrices.relative_error(rotated, q @ plain) < PARITY


def test_the_forecast_says_what_the_step_did():
    ranks = [(None, None), (3, None), (0, None)]
    pairs = [pair(ranks=case) for case in ranks]
    found = solved(pairs, config_for())
    for i, (d, tau) in enumerate(pairs):
        removed, restored, drift, _, captured, _ = (float(x[i]) for x in found.forecast)
        v2, size = oracle.leading(d, 12), np.sum(tau**2)
        correction = np.asarray(found.updates[0][i]) - tau @ oracle.projector(d, 12)
        assert removed == pytest.approx(np.sum((tau @ v2) ** 2) / size, rel=1e-4)
        assert restored == pytest.approx(np.sum(correction**2) / size, rel=1e-4, abs=1e-10)
        assert drift < 1e-12
        assert captured == pytest.approx(np.sum((d @ v2) ** 2) / np.sum(d**2) if ranks[i][0] != 0 else 1, rel=1e-4)
    shares = np.asarray(found.forecast.restored_share)
    assert shares[0] > 1e-3 and shares[2] == 0  # without a D nothing is asked for


def test_a_stack_equals_its_layers_alone():
    """Even beside a layer a thousand times larger, and one that is zero."""
    scales = (0.02, 20.0, 0.0)
    pairs = [pair(scale=scale) for scale in scales]
    d, tau = (jnp.stack([jnp.asarray(x) for x in side]) for side in zip(*pairs, strict=True))
    together = solve_stack(d, tau, config=config_for(), adapter_init=jnp.zeros((3, 0, 48)))
    assert together.losses.shape == (3, 2)
    for i, scale in enumerate(scales):
        alone = solve_layer(d[i], tau[i], config=config_for(), adapter_init=jnp.zeros((0, 48)))
        np.testing.assert_allclose(together.update[i], alone.update, rtol=0, atol=1e-6 * max(scale, 1e-9))
        np.testing.assert_allclose(together.losses[i], alone.losses, rtol=1e-5, atol=1e-12)


def test_shapes_of_one_width_share_a_group_without_touching_each_other():
    pairs = [pair((24, 48)), pair(SHAPE)]
    merged, task = (tuple(jnp.asarray(x)[None] for x in side) for side in zip(*pairs, strict=True))
    program = functools.partial(layers._solve_group, config=config_for())
    both = run_alone(program, merged, task, jnp.zeros((2, 0, 48)))
    assert both.losses.shape == (2, 2)
    for update, (d, tau) in zip(both.updates, pairs, strict=True):
        assert matrices.relative_error(update[0], update_of(d, tau, config_for())) < PARITY


def test_the_second_call_at_a_shape_compiles_nothing():
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(solve.solve_group, n=1))
    for seed in range(3):
        d, tau = (jnp.asarray(matrices.power_law(SHAPE, seed=seed + s))[None] for s in (0, 10))
        jax.block_until_ready(counted((d,), (tau,), jnp.zeros((1, 0, 48)), config=config_for(ridge=0.5 + seed)))


def test_the_same_inputs_give_the_same_bits():
    chex.assert_trees_all_equal(*(solved([pair()], config_for()) for _ in range(2)))


def test_half_precision_inputs_are_computed_in_float32():
    d, tau = (jnp.asarray(x, jnp.bfloat16) for x in pair())
    found = solve_layer(d, tau, config=config_for(), adapter_init=jnp.zeros((0, 48)))
    expected, _ = exact.closed_form_update(np.asarray(d, np.float64), np.asarray(tau, np.float64), **RANKS, ridge=1.0)
    assert (found.update.dtype, found.losses.dtype) == (jnp.float32, jnp.float32)
    assert matrices.relative_error(found.update, expected) < PARITY


def test_a_broken_layer_is_reported_and_its_neighbour_is_not():
    d, tau = pair()
    broken = tau.copy()
    broken[0, 0] = np.nan
    assert solved([(d, tau), (d, broken)], config_for()).ok.tolist() == [True, False]


def test_a_start_of_the_adapter_is_refused():
    with pytest.raises(ConfigError, match=r"adapter_init: must be \(0, 4\) for this config, got \(2, 4\)"):
        solve_layer(
            jnp.zeros((4, 4)), jnp.zeros((4, 4)), config=config_for(adapter_rank=2), adapter_init=jnp.zeros((2, 4))
        )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"solver": "lbfgs"}, "solver must be one of adam, closed_form, got 'lbfgs'"),
        ({"ridge": 0}, "ridge must be at least 0.0001, got 0"),
        ({"ridge": -1.0}, "ridge must be at least 0.0001, got -1.0"),
        ({"ridge": float("inf")}, "ridge must be a finite number, got inf"),
        ({"ridge": float("nan")}, "ridge must be a finite number, got nan"),
        ({"ridge": "1"}, "ridge must be a finite number, got '1'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        NufiltConfig(**setting)


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("least", [0, -8])
def test_the_correction_is_as_exact_as_its_directions(least, ridge):
    """S has eigenvalues down to 10^-8 here, and rounding V1 alone moves the answer by about eps / sqrt(λ)."""
    rng = np.random.default_rng(0)
    q = matrices.orthonormal(rng, 96, 96)
    sines = np.sqrt(np.logspace(0, least, 8))
    v2 = q[:, :12]
    v1 = (q[:, 20:28] * sines + q[:, :8] * np.sqrt(1 - sines**2)) @ matrices.orthonormal(rng, 8, 8)
    v2, v1, target = (x.astype(np.float32) for x in (v2, v1, rng.normal(size=(64, 8))))
    left, right, losses = smallest_correction(*(jnp.asarray(x) for x in (target, v2, v1)), ridge=ridge)
    found = left @ right.T
    exactly = (x.astype(np.float64) for x in (target, v1, v2))
    expected = exact.smallest_answer(*exactly, ridge)
    tolerance = 10 * oracle.EPS * (1 + ridge**-0.5)
    assert matrices.relative_error(found, expected) < tolerance
    assert np.linalg.norm(found @ v2) < tolerance * np.linalg.norm(expected)
    np.testing.assert_allclose(losses, [np.sum(target**2), np.sum((expected @ v1 - target) ** 2)], rtol=2 * tolerance)


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0, 1e4, 1e38])
@pytest.mark.parametrize("size", [0, 1, 8, 64])
def test_the_inverse_takes_steps_enough(size, ridge):
    rng = np.random.default_rng(1)
    x = (matrices.orthonormal(rng, 80, size) * np.linspace(0, 1, size)) @ matrices.orthonormal(rng, size, size)
    gain = 1 / (1 + ridge)
    expected = np.linalg.inv(gain * x.T @ x + (1 - gain) * np.eye(size))
    found = np.asarray(blended_inverse(jnp.asarray(x, jnp.float32), ridge=ridge))
    np.testing.assert_allclose(found, expected, rtol=0, atol=10 * oracle.EPS * (1 + 1 / ridge) ** 2)
