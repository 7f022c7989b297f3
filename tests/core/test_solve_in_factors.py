"""One step with D and τ in factors, against float64 on the matrices that they stand for."""

import functools

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import oracle
import oracle_closed_form
import pytest

from nufilt_jax.core.solve import solve_group
from nufilt_jax.linalg.dispatch import run_alone
from nufilt_jax.linalg.factored import Factored
from nufilt_jax.methods.nufilt import NufiltConfig

M, N = 80, 272  # wide enough that no full decomposition is taken
PARITY = 1e-5


def drawn(rng, rank, columns):
    """Q R of a rank, with room for more."""
    basis, rows = np.zeros((M, columns)), np.zeros((columns, N))
    if rank:
        basis[:, :rank] = matrices.orthonormal(rng, M, rank)
        rows[:rank] = 0.1 * rng.standard_normal((rank, N))
    return Factored(*(jnp.asarray(x[None], jnp.float32) for x in (basis, rows)))


def exactly(x):
    return np.asarray(x.basis[0], np.float64) @ np.asarray(x.rows[0], np.float64)


def step(d, tau, start, config):
    """D + Δ, the losses, and whether all directions were certified at once."""
    solve = jax.jit(functools.partial(solve_group, config=config, add=True, until_certified=False))
    found = run_alone(solve, (d,), (tau,), jnp.asarray(start[None], jnp.float32))
    return found.updates[0], np.asarray(found.losses[0]), bool(found.forecast.certified[0])


@pytest.mark.parametrize("filter_rank", [12, 5])
@pytest.mark.parametrize("merged_rank", [8, 0])
@pytest.mark.parametrize("solver", ["adam", "closed_form"])
def test_a_step_in_factors(solver, merged_rank, filter_rank):
    """D of a rank below and above r_p, and of rank 0."""
    rng = np.random.default_rng(merged_rank + filter_rank)
    d, tau = drawn(rng, merged_rank, 12), drawn(rng, 4, 4)
    sizes = {"filter_rank": filter_rank, "task_rank": 3}
    config = NufiltConfig(solver=solver, adapter_rank=6, steps=8, ridge=0.5, **sizes)
    start = 0.02 * rng.standard_normal((config.trained_rank, N)).astype(np.float32)
    found, losses, is_certified = step(d, tau, start, config)
    assert is_certified
    if solver == "adam":
        update, expected = oracle.nufilt_update(exactly(d), exactly(tau), start, steps=8, **sizes)
    else:
        update, expected = oracle_closed_form.closed_form_update(exactly(d), exactly(tau), ridge=0.5, **sizes)
    assert matrices.relative_error(exactly(found) - exactly(d), update) < PARITY
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)


def test_the_same_task_again_adds_nothing():
    """All that it changes is in the directions that the filter removes, and its answer is there already."""
    rng = np.random.default_rng(3)
    tau = drawn(rng, 4, 4)
    d = Factored(
        *(
            jnp.pad(x, pad)
            for x, pad in zip((tau.basis, tau.rows), (((0, 0), (0, 0), (0, 8)), ((0, 0), (0, 8), (0, 0))), strict=True)
        )
    )
    config = NufiltConfig(solver="closed_form", filter_rank=12, task_rank=3)
    found, _, _ = step(d, tau, np.zeros((0, N), np.float32), config)
    np.testing.assert_allclose(exactly(found), exactly(d), atol=1e-6)
