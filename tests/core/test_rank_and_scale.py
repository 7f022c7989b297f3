"""Ranks at and above a layer's width, matrices of a lower rank, and weights of any size, by every route."""

import jax.numpy as jnp
import matrices
import numpy as np
import oracle
import pytest

from nufilt_jax import NufiltConfig, solve_stack

PARITY = 5e-5
ROUTES = ["auto", "eigh", "subspace", "svd"]
# Width, rank of D, and its smallest singular value that is not zero, as a share of the largest.
DEFICIENT = [(64, 16, 1e-2), (64, 40, 1e-4), (64, 32, 1e-3), (64, 64, 1e-2)]


def falling(width, rank, least, seed):
    """σ from 1 down to `least` in equal steps of the logarithm, then zeros; the rank cuts between none of them."""
    rng = np.random.default_rng(seed)
    s = np.where(np.arange(width) < rank, least ** (np.arange(width) / max(rank - 1, 1)), 0)
    left, right = (matrices.orthonormal(rng, width, width) for _ in range(2))
    return ((left * s) @ right.T).astype(np.float32)


def layers(scale=1.0):
    """D and τ of a layer for each row of `DEFICIENT`: τ of full rank, and of D's."""
    d = [falling(*row, seed=i) for i, row in enumerate(DEFICIENT)]
    tau = [matrices.power_law((64, 64), seed=9 + i, scale=0.1) for i in range(len(d) - 1)]
    tau.append(falling(64, 5, 0.1, seed=99))
    return scale * np.stack(d), scale * np.stack(tau)


def updates(d, tau, config):
    start = np.stack([matrices.start(config.adapter_rank, d.shape[2], seed=i) for i in range(len(d))])
    found = solve_stack(
        jnp.asarray(d, jnp.float32), jnp.asarray(tau, jnp.float32), config=config, adapter_init=jnp.asarray(start)
    )
    assert bool(found.ok.all())
    return np.asarray(found.update, np.float64), start


@pytest.mark.parametrize("filter_rank", [24, 64, 128], ids=["below the width", "the width", "above it"])
@pytest.mark.parametrize("route", ROUTES)
def test_matrices_of_a_lower_rank_equal_the_oracle(route, filter_rank):
    d, tau = layers()
    config = NufiltConfig(filter_rank=filter_rank, adapter_rank=4, task_rank=8, decomposition=route)
    found, start = updates(d, tau, config)
    for i, update in enumerate(found):
        expected, _ = oracle.nufilt_update(d[i], tau[i], start[i], filter_rank=filter_rank, task_rank=8)
        if filter_rank >= 64 and DEFICIENT[i][1] == 64:  # all is filtered: what is left is the adapter's alone
            assert np.linalg.norm(update - expected) < PARITY * np.linalg.norm(tau[i])
        else:
            # Rounding leaves a direction open by eps σ_1/σ_k: an SVD in float32 is as far off.
            tolerance = max(PARITY, 0.1 * oracle.EPS / DEFICIENT[i][2])
            assert matrices.relative_error(update, expected) < tolerance


@pytest.mark.parametrize("scale", [2.0**-73, 2.0**63], ids=["1e-22", "1e19"])
@pytest.mark.parametrize("filter_rank", [24, 128])
@pytest.mark.parametrize("route", ROUTES)
def test_the_filter_does_not_feel_the_unit_of_the_weights(route, filter_rank, scale):
    config = NufiltConfig(filter_rank=filter_rank, adapter_rank=0, task_rank=0, steps=0, decomposition=route)
    d, tau = layers(scale)
    found, _ = updates(d, tau, config)
    for i, update in enumerate(found):
        expected = tau[i].astype(np.float64) @ oracle.projector(d[i], filter_rank)
        assert np.linalg.norm(update - expected) < PARITY * np.linalg.norm(tau[i].astype(np.float64))


@pytest.mark.parametrize("scale", [2.0**-73, 2.0**63], ids=["1e-22", "1e19"])
def test_the_adapter_is_trained_at_any_unit(scale):
    """Large weights have large gradients, whose size Adam does not feel; those of small ones are nothing beside ε."""
    config = NufiltConfig(filter_rank=24, adapter_rank=4, task_rank=8)
    d, tau = layers(scale)
    found, start = updates(d, tau, config)
    for i, update in enumerate(found):
        expected, _ = oracle.nufilt_update(d[i], tau[i], start[i], filter_rank=24, task_rank=8)
        assert matrices.relative_error(update, expected) < PARITY
