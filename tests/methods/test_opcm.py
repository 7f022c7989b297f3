import jax
import jax.numpy as jnp
import numpy as np
import oracle_matrices as oracle
import pytest
from matrix_models import (
    BIAS,
    CLASS,
    FC1,
    FC2,
    PATCH,
    POSITION,
    SHARED,
    T5,
    T5_LINEAR,
    TOWER,
    TOWER_LINEAR,
    Q,
    draw,
    low_rank,
    merged,
    merged_one,
    of_one,
    orthogonal,
    relative_error,
    states,
)

from nufilt_jax import methods
from nufilt_jax.methods import matrices, opcm
from nufilt_jax.methods.opcm import OpcmConfig

CONFIG = OpcmConfig()
MASKED = OpcmConfig(mask_diagonal=True)
TASKS = [draw(TOWER, seed) for seed in (1, 2, 3, 4)]
LINEAR_TASKS = [{name: task[name] for name in TOWER_LINEAR} for task in TASKS]
SHAPES = [(12, 12), (19, 12), (12, 19), (1, 7), (7, 1)]
# P turns with the block of D by rounding over the gap at its end, which is above 1/50 of σ_1 in these draws.
TOLERANCE = 50 * float(np.finfo(np.float32).eps) * 12


def pair(shape, seed=0):
    rng = np.random.default_rng(seed)
    return [(1e-2 * rng.normal(size=shape)).astype(np.float32) for _ in range(2)]


def projected(d, tau, config=CONFIG):
    """P(τ), from the sum before it is rescaled: the first step's λ is 1."""
    first, second = states(config, of_one(d, tau))
    name = Q.format(0)
    return np.asarray(second.delta[name]) * second.extra["scale"] - np.asarray(first.delta[name])


def assert_is(state, wanted, scale):
    assert float(state.extra["scale"]) == pytest.approx(scale, rel=TOLERANCE)
    for name, x in wanted.items():
        assert np.linalg.norm(state.delta[name] - x) <= TOLERANCE * np.linalg.norm(x)


@pytest.mark.parametrize("mask_diagonal", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_four_tasks_are_the_definition(mask_diagonal, skip):
    config = OpcmConfig(mask_diagonal=mask_diagonal, skip_class_embedding=skip)
    skipped = [CLASS] if skip else []
    wanted = oracle.opcm(TASKS, linear=TOWER_LINEAR, mask_diagonal=mask_diagonal, skipped=skipped)
    for state, (d, scale) in zip(states(config, TASKS), wanted, strict=True):
        assert_is(state, d, scale)


@pytest.mark.parametrize("copies", [1, 3])
def test_embeddings_of_a_linear_weights_shape_are_added_whole(copies):
    """T5: `shared` and `lm_head` share a stack; P is of the second alone, and the first counts `copies` times."""
    tasks = [draw(T5, seed) for seed in (1, 2, 3)]
    wanted = oracle.opcm(tasks, linear=T5_LINEAR, copies={SHARED: copies})
    for state, (d, scale) in zip(states(OpcmConfig(embedding_copies=copies), tasks), wanted, strict=True):
        assert_is(state, d, scale)
    assert {len(members) for members in state.delta.names if SHARED in members} == {2}


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_leading_block_is_removed_and_nothing_else(shape, alpha):
    d, tau = pair(shape)
    got = projected(d, tau, OpcmConfig(alpha=alpha))
    u, v, _ = oracle.opcm_block(d, alpha)
    wanted = oracle.opcm_projected(d, tau, alpha, False)
    assert np.linalg.norm(got - wanted) <= TOLERANCE * np.linalg.norm(tau)
    assert np.linalg.norm(u.T @ got @ v) <= TOLERANCE * np.linalg.norm(tau)
    assert np.linalg.norm(got) <= (1 + TOLERANCE) * np.linalg.norm(tau)
    again = projected(d, got, OpcmConfig(alpha=alpha))
    assert np.linalg.norm(again - got) <= 2 * TOLERANCE * np.linalg.norm(tau)
    assert alpha > 0 or u.size == 0


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_only_the_masked_variant_is_orthogonal_to_what_was_there(shape):
    d, tau = pair(shape)
    unit = np.linalg.norm(d) * np.linalg.norm(tau)
    assert abs(np.sum(projected(d, tau, MASKED) * d)) < TOLERANCE * unit
    assert abs(np.sum(projected(d, tau) * d)) > 1e-3 * unit


def test_the_norm_is_the_mean_of_the_tasks():
    for config in (CONFIG, OpcmConfig(skip_class_embedding=False), MASKED):
        for t, state in enumerate(states(config, TASKS), 1):
            mean = np.mean([oracle.model_norm(task) for task in TASKS[:t]])
            assert oracle.model_norm(state.delta) == pytest.approx(mean, rel=1e-6)


def test_norms_of_large_models_are_as_exact_as_float32():
    """One after another, equal numbers would add up wrong: past 2²⁴ of them a float32 sum no longer grows."""
    large = np.full((1, 4100, 4100), 0.1, np.float32)
    norm = opcm._norm(opcm._size(jax.device_put(large), jnp.float32(1))[None])
    assert float(norm) == pytest.approx(np.sqrt(np.sum(large.astype(np.float64) ** 2)), rel=3e-7)


def test_zeros_beside_small_numbers_do_not_change_their_norm():
    tiny, zeros = {BIAS: np.full(12, 1e-30, np.float32)}, {POSITION: np.zeros((2, 12), np.float32)}
    alone, beside = (states(CONFIG, [tasks] * 2)[-1] for tasks in (tiny, tiny | zeros))
    assert float(beside.extra["norms"]) == pytest.approx(2e-30 * np.sqrt(12), rel=1e-6)
    np.testing.assert_array_equal(alone.delta[BIAS], beside.delta[BIAS])


def test_the_first_model_is_taken_as_it_is():
    [state] = states(CONFIG, TASKS[:1])
    for name in TOWER:
        np.testing.assert_array_equal(state.delta[name], TASKS[0][name])
    assert float(state.extra["scale"]) == 1
    assert float(state.extra["norms"]) == pytest.approx(oracle.model_norm(TASKS[0]), rel=1e-6)


def test_without_a_block_the_sum_is_rescaled():
    tasks = [{name: x for name, x in task.items() if name != CLASS} for task in TASKS]
    got = merged(OpcmConfig(alpha=0), *tasks)
    total = {name: sum(np.float64(task[name]) for task in tasks) for name in got}
    factor = np.mean([oracle.model_norm(task) for task in tasks]) / oracle.model_norm(total)
    for name, x in total.items():
        assert relative_error(got[name], factor * x) < 1e-6


def test_the_same_linear_task_again_changes_nothing_if_masked():
    for state in states(MASKED, LINEAR_TASKS[:1] * 3):
        assert_is(state, LINEAR_TASKS[0], 1.0)


def test_what_each_kind_of_tensor_feels():
    """θ_2 of one tensor moves all others by the norm alone, and the class embedding by nothing else."""
    plain = states(CONFIG, TASKS[:2])[-1]
    for name in (Q.format(0), POSITION, BIAS, CLASS, PATCH):
        changed = TASKS[1] | {name: -2 * TASKS[1][name]}
        other = states(CONFIG, [TASKS[0], changed])[-1]
        ratio = plain.extra["scale"] / other.extra["scale"]
        assert abs(ratio - 1) > 1e-5
        for key in TOWER:
            follows = relative_error(other.delta[key], ratio * np.asarray(plain.delta[key])) < 1e-6
            assert follows == (key != name or name == CLASS)


def test_the_class_embedding_only_shrinks():
    first = TASKS[0][CLASS]
    factors = [np.asarray(state.delta[CLASS]) / first for state in states(CONFIG, TASKS)]
    for factor in factors:
        np.testing.assert_allclose(factor, factor[0], rtol=1e-6)
    assert 1 == factors[0][0] > factors[1][0] > factors[2][0] > factors[3][0] > 0


@pytest.mark.parametrize("config", [CONFIG, MASKED], ids=["code", "masked"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_rotations_commute(config, shape):
    d, tau = pair(shape)
    left, right = orthogonal(shape[0], 1), orthogonal(shape[1], 2)
    rotated = merged_one(config, left @ d @ right, left @ tau @ right)
    assert relative_error(rotated, left @ merged_one(config, d, tau) @ right) < 2 * TOLERANCE


def test_scaling_commutes_and_hidden_units_may_be_renumbered():
    order = np.random.default_rng(5).permutation(19)

    def renumbered(model):
        return model | {FC1.format(0): model[FC1.format(0)][order], FC2.format(0): model[FC2.format(0)][:, order]}

    plain = merged(CONFIG, *TASKS)
    scaled = merged(CONFIG, *({name: 3 * x for name, x in task.items()} for task in TASKS))
    other = merged(CONFIG, *map(renumbered, TASKS))
    for name in TOWER:
        assert relative_error(scaled[name], 3 * plain[name]) < TOLERANCE
        assert relative_error(other[name], renumbered(plain)[name]) < TOLERANCE


@pytest.mark.parametrize("config", [CONFIG, MASKED], ids=["code", "masked"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_low_rank_and_zero_updates(config, shape):
    """Null vectors, of which the SVD has its choice, take no part; all of them are null for D = 0."""
    zero, d, tau = np.zeros(shape, np.float32), low_rank(shape, 3, 1), low_rank(shape, 2, 2)
    wanted = oracle.opcm_projected(d, tau, 0.5, config.mask_diagonal)
    assert np.linalg.norm(projected(d, tau, config) - wanted) <= TOLERANCE * np.linalg.norm(tau)
    np.testing.assert_array_equal(merged_one(config, zero, zero, zero), zero)
    np.testing.assert_allclose(merged_one(config, zero, tau), tau / 2, rtol=1e-6)
    np.testing.assert_allclose(merged_one(config, d, zero), d / 2, rtol=1e-6)


def test_updates_that_cancel_leave_zero_from_which_it_goes_on():
    tasks = [{BIAS: x} for x in (TASKS[0][BIAS], -TASKS[0][BIAS], TASKS[1][BIAS])]
    _, cancelled, after = states(CONFIG, tasks)
    np.testing.assert_array_equal(cancelled.delta[BIAS], np.zeros(12))
    norms = [np.linalg.norm(task[BIAS]) for task in tasks]
    np.testing.assert_allclose(after.delta[BIAS], tasks[2][BIAS] / norms[2] * np.mean(norms), rtol=1e-6)


def test_a_layer_does_not_feel_the_direction_of_those_beside_it():
    d, tau = pair((12, 12))
    loud = pair((12, 12), seed=1)
    beside = merged(CONFIG, *({Q.format(0): x, Q.format(1): 1000 * y} for x, y in zip((d, tau), loud, strict=True)))
    alone = merged_one(CONFIG, d, tau)
    unit = np.linalg.norm(alone)
    np.testing.assert_allclose(beside[Q.format(0)] / np.linalg.norm(beside[Q.format(0)]), alone / unit, atol=TOLERANCE)


def test_a_merge_goes_on_from_host_arrays_and_compiles_nothing():
    """As from disk: what the state holds are NumPy arrays then."""
    rule = methods.get("opcm", CONFIG)
    state = rule.init(TASKS[0])
    state = rule.update(rule.update(state, TASKS[0]), TASKS[1])
    programs = (matrices._program, opcm._rescale, opcm._size, opcm._norm)
    before = [program._cache_size() for program in programs]
    restored = jax.tree.map(np.array, state)
    one, other = rule.update(state, TASKS[2]), rule.update(restored, TASKS[2])
    assert [program._cache_size() for program in programs] == before
    assert {key: (x.shape, x.dtype) for key, x in other.extra.items()} == {
        key: ((), np.float32) for key in ("scale", "norms")
    }
    for name in TOWER:
        np.testing.assert_array_equal(one.delta[name], other.delta[name])


def test_directions_up_to_exactly_the_share_of_the_mass_are_removed():
    """ρ is the last k with Σ_{i≤k} σ_i ≤ α Σ σ: equality counts."""
    d, tau = jnp.diag(jnp.asarray([3.0, 2.0, 1.75, 1.5, 1.25, 0.5])), jnp.ones((6, 6))
    found = np.asarray(opcm._projected(d, tau, OpcmConfig(alpha=0.5, mask_diagonal=False)))
    expected = np.ones((6, 6))
    expected[:2, :2] = 0
    np.testing.assert_allclose(found, expected, atol=1e-6)
