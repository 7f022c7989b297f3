"""The rule `nufilt` with its closed form: the same merge, state and report, without a random start or an Adam step."""

import dataclasses

import numpy as np
import oracle
import oracle_closed_form as exact
import pytest
from merging import BASE, SELECTED, TASKS

from nufilt_jax import methods
from nufilt_jax.methods import nufilt
from nufilt_jax.methods.adapter_only import AdapterOnlyConfig
from nufilt_jax.methods.nufilt import NufiltConfig

CONFIG = NufiltConfig(filter_rank=8, task_rank=3, solver="closed_form", decomposition="svd")


def merged(config=CONFIG, tasks=TASKS, **options):
    rule = methods.get("nufilt", config, **options)
    state = rule.init(BASE)
    for task in tasks:
        state = rule.update(state, task)
    return state


def test_it_is_algorithm_1_with_another_step_2():
    state = merged()
    for name in SELECTED:
        d = (TASKS[0][name] - BASE[name]).astype(np.float64)
        for task in TASKS[1:]:
            tau = task[name] - BASE[name]
            update, losses = exact.closed_form_update(d, tau, filter_rank=8, task_rank=3, ridge=1.0)
            d = d + update
        assert np.linalg.norm(state.delta[name] - d) < 5e-5 * np.linalg.norm(d)
        np.testing.assert_allclose(state.report[name].losses, losses, rtol=1e-3)


def test_settings_of_the_other_solver_and_the_seed_change_nothing():
    config = dataclasses.replace(CONFIG, adapter_rank=0, steps=3, learning_rate=0.5)
    here, there = merged(), merged(config, seed=5)
    for name in SELECTED:
        np.testing.assert_array_equal(here.delta[name], there.delta[name])
        assert len(there.report[name].losses) == 2


def test_the_ridge_changes_nothing_for_adam():
    config = dataclasses.replace(CONFIG, solver="adam", adapter_rank=2, steps=2)
    here, there = (merged(dataclasses.replace(config, ridge=ridge), TASKS[:2]) for ridge in (1.0, 9.0))
    for name in SELECTED:
        np.testing.assert_array_equal(here.delta[name], there.delta[name])


def test_earlier_directions_stay_untouched():
    first, second = merged(tasks=TASKS[:1]), merged(tasks=TASKS[:2])
    for name in SELECTED:
        change = np.asarray(second.delta[name]) - np.asarray(first.delta[name])
        assert np.abs(change @ oracle.leading(np.asarray(first.delta[name]), 8)).max() < 1e-5
        assert second.report[name].forecast.drift < 1e-10
        assert second.report[name].losses[1] < second.report[name].losses[0]


@pytest.mark.parametrize("first_task", ["paper", "authors"])
def test_the_first_task_is_taken_as_without_it(first_task):
    here = merged(dataclasses.replace(CONFIG, first_task=first_task), TASKS[:1]).merged
    there = merged(NufiltConfig(filter_rank=8, first_task=first_task), TASKS[:1]).merged
    for name in SELECTED:
        np.testing.assert_array_equal(here[name], there[name])


def test_the_second_task_compiles_nothing():
    config = dataclasses.replace(CONFIG, ridge=0.3)
    merged(config, TASKS[:2])
    before = nufilt._step._cache_size()
    merged(config)
    assert nufilt._step._cache_size() == before


def test_progress_tells_the_losses_before_and_after():
    told = []
    rule = methods.get("nufilt", CONFIG)
    state = rule.update(rule.init(BASE), TASKS[0])
    rule.update(state, TASKS[1], on_stack=lambda *news: told.append(news))
    [(text, report)] = told
    assert (text, report.losses.shape) == ("10 layers of width 32", (10, 2))


def test_only_nufilt_has_the_choice():
    assert not {"solver", "ridge"} & {field.name for field in dataclasses.fields(AdapterOnlyConfig)}


def test_what_has_no_effect_is_known():
    assert NufiltConfig().idle.keys() == {"ridge"}
    assert CONFIG.idle.keys() == {"adapter_rank", "steps", "learning_rate"}
    assert AdapterOnlyConfig().idle == {}
