"""Matrices in factors, and the directions of their few rows, against float64."""

import functools

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import pytest

from nufilt_jax.linalg.dispatch import run_alone
from nufilt_jax.linalg.factored import Factored, by_outputs, dense, plus, rows_of
from nufilt_jax.linalg.thin import leading_of_rows


def factored(rng, m, n, r, columns=None, fall=1.0):
    """Q R with r columns that are used, of `columns`; singular values fall by that factor."""
    columns = columns or r
    basis, rows = np.zeros((m, columns)), np.zeros((columns, n))
    basis[:, :r] = matrices.orthonormal(rng, m, r)
    rows[:r] = (fall ** np.arange(r))[:, None] * matrices.orthonormal(rng, n, r).T
    return Factored(jnp.asarray(basis, jnp.float32), jnp.asarray(rows, jnp.float32))


def exactly(x):
    return np.asarray(x.basis, np.float64) @ np.asarray(x.rows, np.float64)


def test_a_matrix_in_factors_is_multiplied_from_the_right():
    rng = np.random.default_rng(0)
    x = factored(rng, 20, 12, 3)
    y = jnp.asarray(rng.standard_normal((12, 2)), jnp.float32)
    assert (x.shape, len(x), x.rank) == ((20, 12), 20, 3)
    np.testing.assert_allclose(by_outputs(x, rows_of(x) @ y), exactly(x) @ np.asarray(y, np.float64), atol=1e-6)
    np.testing.assert_allclose(dense(x), exactly(x), atol=1e-6)
    np.testing.assert_allclose(x.outputs(slice(3, 5)), exactly(x)[3:5], atol=1e-6)


ADDED = {
    "new": lambda rng, x: factored(rng, 20, 12, 2),
    "same span": lambda rng, x: Factored(x.basis[:, :2], jnp.ones((2, 12), jnp.float32)),
    "one of two": lambda rng, x: Factored(
        jnp.asarray(np.stack([np.asarray(x.basis)[:, 0], matrices.orthonormal(rng, 20, 1)[:, 0]], 1)), x.rows[:2]
    ),
    "columns of the identity": lambda rng, x: Factored(jnp.eye(20, 2, dtype=jnp.float32), x.rows[:2]),
    "zero": lambda rng, x: Factored(jnp.zeros((20, 2), jnp.float32), x.rows[:2]),
}


@pytest.mark.parametrize("start", ["drawn", "identity"])
@pytest.mark.parametrize("case", ADDED)
def test_a_sum_is_kept_in_an_orthonormal_basis(case, start):
    """Whatever the summands share: nothing is counted twice, and nothing is lost."""
    rng = np.random.default_rng(1)
    x = factored(rng, 20, 12, 4, columns=6)
    if start == "identity":
        x = Factored(jnp.asarray(np.eye(20, 6) * (np.arange(6) < 4), jnp.float32), x.rows)
    y = ADDED[case](rng, x)
    found = run_alone(jax.jit(plus), x, y, y)
    assert found.basis.shape == x.basis.shape
    np.testing.assert_allclose(exactly(found), exactly(x) + exactly(y), atol=3e-6)
    overlap = np.asarray(found.basis, np.float64).T @ np.asarray(found.basis, np.float64)
    np.testing.assert_allclose(overlap, np.diag(np.round(np.diagonal(overlap))), atol=1e-6)


def test_what_a_rank_is_filled_up_with_stays_zero():
    rng = np.random.default_rng(3)
    x, y = factored(rng, 20, 12, 4, columns=8), factored(rng, 20, 12, 2, columns=4)
    found = run_alone(jax.jit(plus), x, y, y)
    np.testing.assert_allclose(exactly(found), exactly(x) + exactly(y), atol=3e-6)
    assert np.flatnonzero(np.any(np.asarray(found.rows) != 0, axis=1)).tolist() == [0, 1, 4, 5, 6, 7]


@pytest.mark.parametrize("until_certified", [False, True])
@pytest.mark.parametrize("rank", [0, 3, 6, 9])
@pytest.mark.parametrize("fall", [0.9, 0.1])
def test_directions_of_few_rows(rank, fall, until_certified):
    """Their span is that of the SVD in float64, as far as float32 can tell: by the size of what is beyond it."""
    rng = np.random.default_rng(2)
    stack = [np.asarray(factored(rng, 40, 300, 5, columns=6, fall=fall).rows) for _ in range(2)]
    solve = jax.jit(functools.partial(leading_of_rows, rank=rank, until_certified=until_certified))
    found = run_alone(lambda x: solve((x,)), jnp.asarray(np.stack(stack)))
    kept = min(rank, 6)
    assert found.vectors.shape == (2, 300, kept)
    for x, v, sizes, ok in zip(stack, found.vectors, found.sizes, found.certified, strict=True):
        v, x = np.asarray(v, np.float64), x.astype(np.float64)
        s = np.linalg.svd(x, compute_uv=False)
        np.testing.assert_allclose(np.sort(sizes)[::-1], s[:kept], atol=1e-5 * s[0])
        missed = np.linalg.norm(x - x @ v @ v.T, 2)
        assert missed <= (s[kept] if kept < len(s) else 0) + 1e-5 * s[0]
        assert ok


def test_no_rows_and_rows_of_zeros():
    none = leading_of_rows((jnp.zeros((2, 3, 300)),), 3, until_certified=False)
    assert not np.asarray(none.sizes).any() and np.isfinite(np.asarray(none.vectors)).all()
