"""Eq. (5) by loops in float64, and what theory promises of it."""

import numpy as np
import pytest

from nufilt_jax.analysis.affinity import (
    affinity,
    affinity_rows,
    all_data_directions,
    data_directions,
    default_rank,
    own_and_cross,
    random_level,
    summarise,
    vector_directions,
)


def samples(seed, rows=60, n=12, rank=12):
    """Inputs whose directions differ in strength: 1, 1/2, 1/3, …"""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(n, rank)))
    return rng.normal(size=(rows, rank)) / np.arange(1, rank + 1) @ basis.T


def leading(x, rank):
    """Right singular vectors of the rows themselves, not of a Gram matrix."""
    return np.linalg.svd(x, full_matrices=False)[2][:rank].T


def by_loops(data, vector):
    total = 0.0
    for direction in data.T:
        for mine in vector.T:
            total += float(direction @ mine) ** 2
    return total / data.shape[1]


def directions(x, vector, r_d=4, r=3):
    return data_directions((x.T @ x).astype(np.float32), r_d), vector_directions(vector.astype(np.float32), r)


def test_affinity_is_equation_5():
    x, vector = samples(1), samples(2, rows=9)
    wanted = by_loops(leading(x, 4), leading(vector, 3))
    assert 0.05 < wanted < 0.95
    assert affinity(*directions(x, vector)) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("rows", [5, 12, 40])
def test_directions_span_the_leading_ones(rows):
    """Fewer, as many and more outputs than inputs."""
    vector = samples(3, rows=rows)
    found, wanted = vector_directions(vector.astype(np.float32), 3), leading(vector, 3)
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, atol=1e-5)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-6)


def test_data_inside_the_vectors_span_have_affinity_one_and_outside_zero():
    axes = np.eye(8)
    data = axes[:4] * np.array([4.0, 3, 2, 1])[:, None]
    assert affinity(*directions(data, 2 * axes[[3, 0, 2, 1]], r=4)) == pytest.approx(1)
    assert affinity(*directions(data, axes[4:], r=4)) == 0
    # More directions of the vector never take away.
    values = [affinity(*directions(samples(1, n=8, rank=8), samples(2, n=8, rank=8), r=r)) for r in range(1, 9)]
    assert values == sorted(values) and values[-1] == pytest.approx(1, abs=1e-5)


def test_random_subspaces_have_the_random_level():
    rng = np.random.default_rng(0)
    values = [
        affinity(*(np.linalg.qr(rng.normal(size=(40, k)))[0].astype(np.float32) for k in (6, 10))) for _ in range(300)
    ]
    assert np.mean(values) == pytest.approx(random_level([10], [40]), abs=0.01)
    assert random_level([10, 5], [40, 10]) == pytest.approx(0.375)


def test_directions_that_are_not_there_do_not_count():
    """As of a LoRA, a frozen layer, or a few tokens: r_d is then what there is."""
    low = samples(4, rank=2)
    found = data_directions((low.T @ low).astype(np.float32), 5)
    assert found.shape == (12, 2)
    np.testing.assert_allclose(found @ found.T, leading(low, 2) @ leading(low, 2).T, atol=1e-5)
    assert vector_directions(low.astype(np.float32), 5).shape == (12, 2)
    assert vector_directions(np.zeros((5, 12), np.float32), 5).shape == (12, 0)
    assert data_directions(np.zeros((12, 12), np.float32), 5).shape == (12, 0)
    one = np.eye(12, dtype=np.float32)[:, :1]
    assert affinity(one, np.zeros((12, 0), np.float32)) == 0
    assert np.isnan(affinity(np.zeros((12, 0), np.float32), one))


def test_more_directions_than_inputs_are_all():
    x = samples(1)
    assert data_directions((x.T @ x).astype(np.float32), 99).shape == (12, 12)


def test_every_task_against_every_vector():
    names = ["a", "b"]
    data = [{name: directions(samples(10 * i + k), samples(0))[0] for k, name in enumerate(names)} for i in (1, 2, 3)]
    vectors = [
        {name: directions(samples(0), samples(20 * j + k))[1] for k, name in enumerate(names)} for j in (1, 2, 3)
    ]
    found = np.stack([affinity_rows(one, vectors, names) for one in data])
    assert found.shape == (3, 3, 2)
    for i in range(3):
        for j in range(3):
            for k, name in enumerate(names):
                assert found[i, j, k] == pytest.approx(by_loops(data[i][name], vectors[j][name]), abs=1e-6)


def test_layers_that_share_their_inputs_share_the_result():
    x = samples(1).astype(np.float32)
    shared = x.T @ x
    found = all_data_directions({"q": shared, "k": shared, "o": 2 * shared})
    assert found["q"] is found["k"] and found["q"] is not found["o"]
    assert found["q"].shape == (12, default_rank(12)) == (12, 2)
    assert (default_rank(768), default_rank(3)) == (128, 1)


def test_summaries():
    values = np.arange(2 * 2 * 11, dtype=float).reshape(2, 2, 11)
    values[0, 0, 0] = np.nan
    found = summarise(values)
    assert found.mean.tolist() == [[5.5, 16], [27, 38]]
    assert found.high[0, 1] == 20 and found.high[0, 0] == pytest.approx(9.1)
    own, cross = own_and_cross(values)
    assert own.tolist() == [*range(1, 11), *range(33, 44)]
    assert cross.tolist() == [*range(11, 33)]
