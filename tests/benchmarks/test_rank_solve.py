"""Many settings of the ranks in one program: each must be what the usual solve with those ranks gives."""

import jax.numpy as jnp
import matrices
import numpy as np
import pytest

from benchmarks.study import rank_solve
from benchmarks.study.rank_solve import solve_settings
from nufilt_jax import NufiltConfig, solve_stack

LAYERS, SHAPE = 3, (40, 32)
LARGEST = NufiltConfig(filter_rank=16, adapter_rank=6, task_rank=5, steps=12, decomposition="svd")
# Fig. 4's kinds: filter alone, each rank at its largest and at 0, and in between.
SETTINGS = ((0, 0, 0), (7, 0, 0), (16, 6, 2), (7, 3, 5), (16, 6, 0))
PARITY = 1e-4  # asked for, relative to the update


def stacks(seed, **spectrum):
    return np.stack([matrices.power_law(SHAPE, seed=seed + i, **spectrum) for i in range(LAYERS)])


def alone(merged, task, start, ranks):
    """The usual solve, whose shapes are the setting's own."""
    filter_rank, adapter_rank, task_rank = ranks
    how = {"filter_rank": filter_rank, "adapter_rank": adapter_rank, "task_rank": task_rank}
    config = NufiltConfig(**how, steps=LARGEST.steps, decomposition="svd")
    return solve_stack(merged, task, config=config, adapter_init=start[:, :adapter_rank]).update


@pytest.mark.parametrize("exponent", [0.3, 1.5])
@pytest.mark.parametrize("shares_d", [True, False], ids=["one D for all", "a D for each"])
def test_every_setting_is_the_usual_solve(shares_d, exponent):
    task = stacks(50, exponent=exponent)
    start = np.stack([matrices.start(6, 32, seed=i) for i in range(LAYERS)])
    merged = np.stack([stacks(10 * s, exponent=exponent) for s in range(1 if shares_d else len(SETTINGS))])
    arrays = [jnp.asarray(x) for x in (merged, task, start)]
    found = solve_settings(*arrays, jnp.array(SETTINGS, jnp.int32), config=LARGEST)
    assert found.shape == (len(SETTINGS), LAYERS, *SHAPE)
    for s, ranks in enumerate(SETTINGS):
        d = merged[0 if shares_d else s]
        for layer, wanted in enumerate(alone(*(jnp.asarray(x) for x in (d, task, start)), ranks)):
            assert matrices.relative_error(found[s, layer], np.asarray(wanted, np.float64)) < PARITY, (ranks, layer)


def test_low_rank_layers_and_frozen_ones():
    merged = np.stack([stacks(1, rank=3)])
    merged[0, 1] = 0
    task = stacks(50, rank=2)
    start = np.stack([matrices.start(6, 32, seed=i) for i in range(LAYERS)])
    arrays = [jnp.asarray(x) for x in (merged, task, start)]
    found = solve_settings(*arrays, jnp.array(SETTINGS, jnp.int32), config=LARGEST)
    for s, ranks in enumerate(SETTINGS):
        wanted = alone(*(jnp.asarray(x) for x in (merged[0], task, start)), ranks)
        np.testing.assert_allclose(found[s], wanted, rtol=0, atol=PARITY * np.linalg.norm(task[0]))


def test_other_settings_of_the_same_number_compile_nothing():
    rank_solve._program.clear_cache()
    arrays = [jnp.asarray(x) for x in (np.stack([stacks(1)]), stacks(50), np.zeros((LAYERS, 6, 32), np.float32))]
    for ranks in ((3, 0, 0), (5, 2, 1)):
        solve_settings(*arrays, jnp.array([ranks, (0, 0, 0)], jnp.int32), config=LARGEST)
    assert rank_solve._program._cache_size() == 1
