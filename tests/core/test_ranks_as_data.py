"""Ranks up to a compiled maximum are data: a sweep over them compiles once, and finds what each would find alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import pytest

from nufilt_jax import NufiltConfig, solve_layer, solve_stack
from nufilt_jax.core import layers
from nufilt_jax.errors import ConfigError

LARGEST = NufiltConfig(filter_rank=24, adapter_rank=12, task_rank=6, steps=20)
SWEEP = [(24, 12, 6), (8, 5, 3), (0, 5, 0)]


def stacks(make, m, n):
    return (jnp.asarray(np.stack([make((m, n), seed) for seed in seeds])) for seeds in ((0, 1), (2, 3)))


def power_law(shape, seed):
    return matrices.power_law(shape, seed=seed, scale=0.5)


def few(shape, seed):
    """Of rank 5, which most of the sweep's ranks are above."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(shape[0], 5)) @ rng.normal(size=(5, shape[1])) / 50).astype(np.float32)


@functools.cache
def start(rank, n):
    return 0.02 * jax.random.normal(jax.random.key(0), (2, rank, n))


@pytest.mark.parametrize(
    ("make", "m", "n", "solver", "sweep"),
    [
        (power_law, 40, 48, "adam", SWEEP),
        (few, 40, 48, "adam", SWEEP),
        (power_law, 12, 64, "adam", SWEEP[1:2]),  # fewer outputs than directions
        (power_law, 40, 48, "closed_form", SWEEP[1:2]),
    ],
)
def test_a_sweep_finds_what_each_of_its_ranks_finds_alone(make, m, n, solver, sweep):
    merged, task = stacks(make, m, n)
    for filter_rank, adapter_rank, task_rank in sweep:
        ranks = {"filter_rank": filter_rank, "adapter_rank": adapter_rank, "task_rank": task_rank}
        config = dataclasses.replace(LARGEST, solver=solver, **ranks)
        given = {"config": config, "adapter_init": start(config.trained_rank, n)}
        alone, found = solve_stack(merged, task, **given), solve_stack(merged, task, **given, largest=LARGEST)
        assert found.update.shape == alone.update.shape and found.losses.shape == alone.losses.shape
        assert found.ok.all()
        assert matrices.relative_error(found.update, alone.update) < 2e-5
        np.testing.assert_allclose(found.losses, alone.losses, rtol=1e-4, atol=1e-5 * float(alone.losses.max()))


def test_a_sweep_is_compiled_once():
    merged, task = stacks(power_law, 40, 48)
    before = layers._solve_group._cache_size()
    for rank in (3, 9, 14, 20, 24):
        config = dataclasses.replace(LARGEST, filter_rank=rank, adapter_rank=rank // 2, learning_rate=1e-4 * rank)
        solve_stack(merged, task, config=config, adapter_init=start(rank // 2, 48), largest=LARGEST)
    assert layers._solve_group._cache_size() <= before + 1


def test_the_largest_may_be_zero():
    merged, task = stacks(power_law, 40, 48)
    none = dataclasses.replace(LARGEST, filter_rank=0, task_rank=0)
    given = {"config": none, "adapter_init": start(12, 48)}
    alone, found = solve_stack(merged, task, **given), solve_stack(merged, task, **given, largest=none)
    np.testing.assert_array_equal(found.update, alone.update)


def test_one_layer_takes_it_too():
    merged, task = stacks(power_law, 40, 48)
    config = dataclasses.replace(LARGEST, filter_rank=5, adapter_rank=4)
    one = solve_layer(merged[0], task[0], config=config, adapter_init=start(4, 48)[0], largest=LARGEST)
    alone = solve_layer(merged[0], task[0], config=config, adapter_init=start(4, 48)[0])
    assert matrices.relative_error(one.update, alone.update) < 2e-5


def test_ranks_below_those_of_the_settings_are_refused_together():
    merged, task = stacks(power_law, 40, 48)
    small = dataclasses.replace(LARGEST, filter_rank=20, task_rank=5)
    with pytest.raises(ConfigError) as raised:
        solve_stack(merged, task, config=LARGEST, adapter_init=start(12, 48), largest=small)
    assert [str(problem) for problem in raised.value.problems] == [
        "largest: has filter_rank 20, which is below the 24 of config",
        "largest: has task_rank 5, which is below the 6 of config",
    ]
