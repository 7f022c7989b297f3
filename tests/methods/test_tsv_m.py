import itertools
import re

import jax
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

from nufilt_jax.methods import matrices, tsv_m
from nufilt_jax.methods.tsv_m import TsvMConfig

CONFIG = TsvMConfig(scale=1.3)
ONE = TsvMConfig()
MATRICES = [name for name, shape in TOWER.items() if len(shape) == 2]
TASKS = [draw(TOWER, seed) for seed in (1, 2, 3)]
SHAPES = [(12, 12), (19, 12), (12, 19), (9, 9), (7, 9)]  # the last two with an odd number of singular values
# Both polar factors divide by the smallest singular value of the vectors of D and τ side by side; in these draws it
# is above 0.02.
TOLERANCE = 50 * float(np.finfo(np.float32).eps) * 12


def pair(shape, seed=0):
    rng = np.random.default_rng(seed)
    return [(1e-2 * rng.normal(size=shape)).astype(np.float32) for _ in range(2)]


def halves(*operands):
    """The singular values that are kept, the largest first."""
    kept = [np.linalg.svd(np.float64(x), compute_uv=False)[: min(x.shape) // 2] for x in operands]
    return np.sort(np.concatenate(kept))[::-1]


def test_three_tasks_are_the_definition():
    """A single row has no half to keep."""
    steps = states(CONFIG, TASKS)
    for name, shape in TOWER.items():
        np.testing.assert_allclose(steps[0].delta[name], 1.3 * TASKS[0][name], rtol=1e-6)
        for t in (1, 2):
            d, tau = np.asarray(steps[t - 1].delta[name]), TASKS[t][name]
            wanted = 1.3 * (oracle.tsv_m(d, tau) if name in MATRICES else (d + tau) / 2)
            error = np.linalg.norm(steps[t].delta[name] - wanted)
            assert error <= TOLERANCE * np.linalg.norm(wanted)
            assert np.any(wanted) == (name not in MATRICES or min(shape) > 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_of_odd_rank(shape):
    d, tau = pair(shape)
    assert relative_error(merged_one(ONE, d, tau), oracle.tsv_m(d, tau)) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_singular_values_are_the_kept_ones(shape):
    """Which says that both factors are orthonormal, and the rank 2 ⌊r/2⌋ at most."""
    d, tau = pair(shape)
    got = np.linalg.svd(merged_one(CONFIG, d, tau), compute_uv=False)
    kept = halves(1.3 * d, tau)
    np.testing.assert_allclose(got[: len(kept)], 1.3 * kept, rtol=TOLERANCE)
    assert np.all(got[len(kept) :] < TOLERANCE * got[0])


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
        bound = 2 * TOLERANCE * np.linalg.norm(plain[name])
        assert np.linalg.norm(scaled[name] - 3 * plain[name]) <= 3 * bound
        assert np.linalg.norm(swapped[name] - plain[name]) <= bound


@pytest.mark.parametrize("shape", [(12, 12), (19, 12), (12, 19)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_updates_of_orthogonal_spaces_are_summed(shape, rank):
    """Rank 6 is the half that is kept; less leaves room that must not fill with null vectors of the SVD's choice."""
    left, right = orthogonal(shape[0], 1), orthogonal(shape[1], 2)
    spectrum = np.float32(1e-2) / np.arange(1, rank + 1, dtype=np.float32)
    d = (left[:, :rank] * spectrum) @ right[:rank]
    tau = (left[:, 6 : 6 + rank] * spectrum) @ right[6 : 6 + rank]
    assert relative_error(merged_one(ONE, d, tau), d + tau) < TOLERANCE


@pytest.mark.parametrize("shape", [(12, 12), (19, 12), (7, 9)], ids=str)
@pytest.mark.parametrize("ranks", [(1, 2), (2, 12), (0, 2), (2, 0), (0, 12), (0, 0)], ids=str)
def test_low_rank_updates_keep_what_they_have(shape, ranks):
    d, tau = (low_rank(shape, rank, seed) for seed, rank in enumerate(ranks))
    got, wanted = merged_one(ONE, d, tau), oracle.tsv_m(d, tau)
    assert np.linalg.norm(got - wanted) <= TOLERANCE * np.linalg.norm(wanted)
    assert np.linalg.matrix_rank(got, 1e-6) == sum(min(rank, min(shape) // 2) for rank in ranks)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)], ids=str)
def test_a_single_row_or_column_becomes_zero(shape):
    np.testing.assert_array_equal(merged_one(ONE, *pair(shape)), np.zeros(shape))


def test_equal_updates_stay_finite():
    """The result is arbitrary: the published formula does not define it."""
    tau = pair((12, 12))[0]
    assert np.all(np.isfinite(merged_one(ONE, tau, tau)))


def test_hidden_units_may_be_renumbered():
    order = np.random.default_rng(5).permutation(19)

    def renumbered(model):
        return model | {FC1.format(0): model[FC1.format(0)][order], FC2.format(0): model[FC2.format(0)][:, order]}

    plain, other = renumbered(merged(ONE, *TASKS)), merged(ONE, *map(renumbered, TASKS))
    for name in TOWER:
        assert np.linalg.norm(other[name] - plain[name]) <= 2 * TOLERANCE * np.linalg.norm(plain[name])


def test_a_layer_does_not_feel_those_beside_it():
    d, tau = pair((12, 12))
    beside = merged(ONE, *({Q.format(0): x, Q.format(1): 1000 * x.T} for x in (d, tau)))
    assert relative_error(beside[Q.format(0)], merged_one(ONE, d, tau)) < TOLERANCE


def test_each_decomposition_waits_for_the_one_before():
    """In the compiled program: two LAPACK calls in flight freeze a CPU of two cores."""
    x = np.zeros((19, 12), np.float32)
    text = jax.jit(lambda d, t: tsv_m._merge(d, t, config=ONE)).lower(x, x).compile().as_text()
    entry = text[text.index("\nENTRY") :].splitlines()
    operands = {
        row[1]: set(re.findall(r"%[\w.-]+", row[2]))
        for row in map(re.compile(r"\s+(?:ROOT )?(%\S+) = (.*)").match, entry)
        if row
    }
    calls = [row.split()[0] for row in entry if 'custom_call_target="lapack' in row]

    def needs(name, seen):
        for operand in operands.get(name, set()) - seen:
            seen.add(operand)
            needs(operand, seen)
        return seen

    assert len(calls) == 4
    assert all(earlier in needs(later, set()) for earlier, later in itertools.pairwise(calls))


def test_the_second_task_compiles_nothing():
    states(CONFIG, TASKS[:2])
    before = matrices._program._cache_size()
    assert all(x.dtype == np.float32 for x in states(CONFIG, TASKS)[-1].delta.values())
    assert matrices._program._cache_size() == before
