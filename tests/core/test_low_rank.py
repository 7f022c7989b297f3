"""Layers of lower rank than directions are asked for, by every route, of every scale: used directions alone count."""

import functools

import jax.numpy as jnp
import matrices
import numpy as np
import oracle
import pytest

from nufilt_jax import NufiltConfig
from nufilt_jax.core import layers
from nufilt_jax.linalg.dispatch import run_alone

ROUTES = ["eigh", "subspace", "svd"]
PARITY = 5e-5
# Rank and σ_r / σ_1; what a Gram matrix knows of the last is from much to nothing.
SPECTRA = {64: [(16, 1e-2), (40, 1e-2), (40, 1e-4), (10, 0.5)], 128: [(32, 1e-3), (16, 1e-2)]}


@functools.cache
def falling(shape, rank, least, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    m, n = shape
    s = np.geomspace(1, least, rank)
    return (scale * (matrices.orthonormal(rng, m, rank) * s @ matrices.orthonormal(rng, n, rank).T)).astype(np.float32)


def solved(pairs, config, a0):
    d, tau = (jnp.stack([jnp.asarray(x) for x in side]) for side in zip(*pairs, strict=True))
    start = jnp.broadcast_to(jnp.asarray(a0), (len(d), *a0.shape))
    found = run_alone(functools.partial(layers._solve_group, config=config), (d,), (tau,), start)
    return found._replace(losses=found.losses[:, : config.n_losses])


def filtered(pairs, filter_rank, route):
    """τ P by the package, and how far it is from the oracle's."""
    config = NufiltConfig(filter_rank=filter_rank, adapter_rank=0, task_rank=0, steps=0, decomposition=route)
    found = solved(pairs, config, np.zeros((0, pairs[0][0].shape[1]), np.float32))
    errors = []
    for (d, tau), update in zip(pairs, found.updates[0], strict=True):
        wanted = tau.astype(np.float64) @ oracle.projector(d.astype(np.float64), filter_rank)
        errors.append(matrices.relative_error(update, wanted))
    return found, errors


@pytest.mark.parametrize("route", ["auto", *ROUTES])
@pytest.mark.parametrize(("width", "filter_rank"), [(64, 32), (64, 63), (64, 64), (64, 128), (128, 128)], ids=str)
def test_the_filter_removes_what_the_layer_uses(width, filter_rank, route):
    shape = (width, width)
    pairs = [(falling(shape, *spectrum, 1), falling(shape, width, 0.5, 2)) for spectrum in SPECTRA[width]]
    _, errors = filtered(pairs, filter_rank, route)
    for (_, least), error in zip(SPECTRA[width], errors, strict=True):
        assert error < max(PARITY, 0.1 * oracle.EPS / least)  # the second is what float32's SVD is off by


@pytest.mark.parametrize("shape", [(24, 64), (96, 64)], ids=str)
@pytest.mark.parametrize("filter_rank", [32, 64])
@pytest.mark.parametrize("route", ROUTES)
def test_whatever_the_shape_and_the_scale(route, filter_rank, shape):
    """Fewer outputs than inputs are a lower rank too. The layers are beside each other."""
    scales = (1e-22, 1e-3, 1.0, 1e19)
    pairs = [(falling(shape, 16, 1e-2, 1, c), falling(shape, 24, 0.5, 2, c)) for c in scales]
    assert max(filtered(pairs, filter_rank, route)[1]) < PARITY


@pytest.mark.parametrize("route", ROUTES)
def test_one_of_the_two_may_be_of_another_scale(route):
    scales = (1e-22, 1.0), (1e19, 1.0), (1.0, 1e-22), (1.0, 1e19)
    pairs = [tuple(falling((48, 64), 20, 1e-2, seed, c) for seed, c in enumerate(both)) for both in scales]
    found, errors = filtered(pairs, 24, route)
    assert max(errors) < PARITY
    for shares in (found.forecast.removed_share, found.forecast.captured):
        np.testing.assert_allclose(shares, shares[0], rtol=1e-3)
    assert not np.isnan(found.forecast.drift).any()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("filter_rank", "task_rank"), [(24, 8), (48, 60), (100, 48)], ids=str)
def test_the_whole_step_equals_the_oracle(filter_rank, task_rank, route):
    d, tau = falling((48, 48), 16, 1e-2, 1, 0.3), falling((48, 48), 12, 1e-2, 2, 0.3)
    config = NufiltConfig(filter_rank=filter_rank, adapter_rank=4, task_rank=task_rank, decomposition=route)
    a0 = matrices.start(4, 48)
    expected, losses = oracle.nufilt_update(d, tau, a0, filter_rank=filter_rank, task_rank=task_rank)
    found = solved([(d, tau)], config, a0)
    assert matrices.relative_error(found.updates[0][0], expected) < PARITY
    np.testing.assert_allclose(found.losses[0], losses, rtol=0, atol=PARITY * losses[0])


@pytest.mark.parametrize("route", ["eigh", "subspace"])
def test_well_separated_directions_need_no_svd(route):
    pair = falling((96, 96), 12, 0.1, 1), falling((96, 96), 96, 0.5, 2)
    for filter_rank in (24, 95, 96, 128):
        found, _ = filtered([pair], filter_rank, route)
        assert bool(found.forecast.certified[0]) and float(found.forecast.cut_gap[0]) == 1


@pytest.mark.parametrize("route", ["eigh", "subspace"])
def test_one_weak_direction_that_a_gram_matrix_does_not_know_is_found(route):
    """Its square is below the rounding of the largest, but it is above what counts as none."""
    pair = falling((320, 320), 40, 1e-4, 1), falling((320, 320), 320, 0.5, 2)
    found, errors = filtered([pair], 60, route)
    assert max(errors) < PARITY and not bool(found.forecast.certified[0])
