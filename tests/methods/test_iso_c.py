import numpy as np
import oracle_matrices as oracle
import pytest
from matrix_models import (
    FC1,
    FC2,
    TOWER,
    Q,
    draw,
    low_rank,
    merged,
    merged_one,
    orthogonal,
    relative_error,
    states,
)

from nufilt_jax.methods import matrices
from nufilt_jax.methods.iso_c import IsoCConfig

CONFIG = IsoCConfig(scale=1.3)
ONE = IsoCConfig()
MATRICES = [name for name, shape in TOWER.items() if len(shape) == 2]
TASKS = [draw(TOWER, seed) for seed in (1, 2, 3)]
SHAPES = [(12, 12), (19, 12), (12, 19), (1, 7), (7, 1)]
# The polar factor of C is as exact as its smallest singular value allows: of these draws σ_1/σ_r is below 100.
TOLERANCE = 20 * float(np.finfo(np.float32).eps) * 12


def pair(shape, seed=0):
    rng = np.random.default_rng(seed)
    return [(1e-2 * rng.normal(size=shape)).astype(np.float32) for _ in range(2)]


def test_three_tasks_are_the_definition():
    steps = states(CONFIG, TASKS)
    for name in TOWER:
        np.testing.assert_allclose(steps[0].delta[name], 1.3 * TASKS[0][name], rtol=1e-6)
        for t in (1, 2):
            d, tau = np.asarray(steps[t - 1].delta[name]), TASKS[t][name]
            wanted = 1.3 * (oracle.iso_c(d, tau) if name in MATRICES else (d + tau) / 2)
            assert relative_error(steps[t].delta[name], wanted) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_singular_values_become_their_mean(shape):
    d, tau = pair(shape)
    got = np.linalg.svd(merged_one(ONE, d, tau), compute_uv=False)
    spectrum = np.linalg.svd(np.float64(d) + tau, compute_uv=False)
    np.testing.assert_allclose(got, np.full(len(got), spectrum.mean()), rtol=TOLERANCE)
    assert got.sum() == pytest.approx(spectrum.sum(), rel=TOLERANCE)  # the nuclear norm stays


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotations_commute(shape):
    d, tau = pair(shape)
    left, right = orthogonal(shape[0], 1), orthogonal(shape[1], 2)
    rotated = merged_one(ONE, left @ d @ right, left @ tau @ right)
    assert relative_error(rotated, left @ merged_one(ONE, d, tau) @ right) < 2 * TOLERANCE


def test_scaling_commutes_and_two_tasks_may_be_swapped():
    plain, swapped = merged(ONE, *TASKS[:2]), merged(ONE, *TASKS[1::-1])
    scaled = merged(ONE, *({name: 3 * x for name, x in task.items()} for task in TASKS[:2]))
    for name in TOWER:
        assert relative_error(scaled[name], 3 * plain[name]) < TOLERANCE
        np.testing.assert_allclose(swapped[name], plain[name], atol=1e-8)


def test_one_task_again_and_again_grows_with_their_number():
    tau = pair((12, 12))[0]
    spectrum = np.linalg.svd(np.float64(tau), compute_uv=False)
    assert relative_error(merged_one(ONE, *[tau] * 4), 4 * spectrum.mean() * oracle.polar(tau)) < 4 * TOLERANCE


def test_hidden_units_may_be_renumbered():
    order = np.random.default_rng(5).permutation(19)

    def renumbered(model):
        return model | {FC1.format(0): model[FC1.format(0)][order], FC2.format(0): model[FC2.format(0)][:, order]}

    plain, other = renumbered(merged(ONE, *TASKS)), merged(ONE, *map(renumbered, TASKS))
    assert all(relative_error(other[name], plain[name]) < 2 * TOLERANCE for name in TOWER)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_zero_and_low_rank_sums_stay_finite(shape):
    """Nothing to spread for C = 0. Else the norm is known, σ̄ √r, though not the directions beyond the rank."""
    zero, tau = np.zeros(shape, np.float32), low_rank(shape, 2, 1)
    np.testing.assert_array_equal(merged_one(ONE, zero, zero), zero)
    np.testing.assert_array_equal(merged_one(ONE, tau, -tau), zero)
    got = merged_one(ONE, zero, tau)
    spectrum = np.linalg.svd(np.float64(tau), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(got), spectrum.mean() * np.sqrt(len(spectrum)), rtol=TOLERANCE)
    u, _, v = oracle.svd(tau)
    np.testing.assert_allclose(u.T @ got @ v, spectrum.mean() * np.eye(2), atol=TOLERANCE * spectrum.mean())


def test_a_layer_does_not_feel_those_beside_it():
    d, tau = pair((12, 12))
    beside = merged(ONE, *({Q.format(0): x, Q.format(1): 1000 * x.T} for x in (d, tau)))
    assert relative_error(beside[Q.format(0)], merged_one(ONE, d, tau)) < TOLERANCE


def test_the_second_task_compiles_nothing():
    states(CONFIG, TASKS[:2])
    before = matrices._program._cache_size()
    assert all(x.dtype == np.float32 for x in states(CONFIG, TASKS)[-1].delta.values())
    assert matrices._program._cache_size() == before
