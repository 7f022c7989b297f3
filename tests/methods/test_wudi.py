import dataclasses
import functools

import jax
import numpy as np
import oracle_matrices as oracle
import pytest
from matrix_models import (
    BIAS,
    CLASS,
    PATCH,
    RELATIVE,
    SHARED,
    T5,
    T5_LINEAR,
    TOWER,
    Q,
    draw,
    low_rank,
    merged,
    merged_one,
    of_one,
    orthogonal,
    states,
)

from nufilt_jax import methods
from nufilt_jax.errors import SolveError
from nufilt_jax.methods import matrices, wudi
from nufilt_jax.methods.wudi import WudiConfig

RATE, STEPS = 1e-5, 50
CONFIG = WudiConfig(learning_rate=RATE, steps=STEPS)
MATRICES = [name for name, shape in TOWER.items() if len(shape) == 2]
TASKS = [draw(TOWER, seed) for seed in (1, 2, 3)]
SHAPES = [(12, 12), (19, 12), (2, 12), (1, 7), (7, 1)]  # the third and fourth keep H as its factor


def pair(shape, seed=0, scale=1e-2):
    rng = np.random.default_rng(seed)
    return [(scale * rng.normal(size=shape)).astype(np.float32) for _ in range(2)]


@pytest.mark.parametrize("scale", [1e-2, 1e-6])
def test_adam_on_the_definition(scale):
    """At the second scale gradients are so small that Adam's ε = 1e-8 decides.

    An element may differ by the rounding of M and by what 50 steps make of the rounding of gradients, 1/500 of a step.
    Losses are rounded in units of the first one, the largest; where D and τ are nearly orthogonal, in more of them.
    """
    rate = RATE * scale / 1e-2
    tasks = [draw(TOWER, seed, scale) for seed in (1, 2, 3)]
    steps = states(WudiConfig(learning_rate=rate, steps=STEPS), tasks)
    for t in (1, 2):
        assert set(steps[t].report) == set(MATRICES)
        for name in MATRICES:
            d = np.asarray(steps[t - 1].delta[name])
            wanted, losses = oracle.wudi(d, tasks[t][name], steps=STEPS, learning_rate=rate)
            np.testing.assert_allclose(steps[t].delta[name], wanted, rtol=0, atol=2e-3 * rate)
            np.testing.assert_allclose(steps[t].report[name].losses, losses, rtol=0, atol=2e-5 * losses[0])
            assert np.abs(wanted - d - tasks[t][name]).max() > 5 * rate  # and it did move


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_updates(shape, rank):
    d, tau = low_rank(shape, rank, 1), low_rank(shape, rank, 2)
    wanted, _ = oracle.wudi(d, tau, steps=STEPS, learning_rate=RATE)
    np.testing.assert_allclose(merged_one(CONFIG, d, tau), wanted, rtol=0, atol=2e-7)


def test_the_first_model_is_taken_as_it_is():
    [state] = states(CONFIG, TASKS[:1])
    for name in TOWER:
        np.testing.assert_array_equal(state.delta[name], TASKS[0][name])
    assert state.report == {}


def test_other_tensors_are_averaged_and_older_ones_fade():
    got = merged(CONFIG, *TASKS)
    for name in (BIAS, CLASS, PATCH):
        np.testing.assert_allclose(
            got[name], sum(w * x[name] for w, x in zip((0.25, 0.25, 0.5), TASKS, strict=True)), atol=1e-8
        )


@pytest.mark.parametrize("variant", ["code", "text"])
def test_the_variant_says_which_matrices_are_solved(variant):
    """`shared` and `lm_head` have one shape, thus one program."""
    tasks = [draw(T5, seed) for seed in (1, 2)]
    state = states(dataclasses.replace(CONFIG, variant=variant), tasks)[-1]
    solved = T5_LINEAR | ({SHARED, RELATIVE} if variant == "code" else set())
    assert set(state.report) == solved
    for name in T5:
        d, tau = tasks[0][name], tasks[1][name]
        wanted, losses = oracle.wudi(d, tau, steps=STEPS, learning_rate=RATE) if name in solved else ((d + tau) / 2, [])
        np.testing.assert_allclose(state.delta[name], wanted, rtol=0, atol=2e-8)
        if name in solved:
            np.testing.assert_allclose(state.report[name].losses, losses, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_updates_of_orthogonal_row_spaces_do_not_interfere(shape):
    """D τᵀ = 0: the sum is the solution. In a rotated basis it is up to rounding, which Adam may blow up to a step."""
    n = shape[1]
    d, tau = pair(shape)
    d[:, n // 2 :], tau[:, : n // 2] = 0, 0
    np.testing.assert_array_equal(merged_one(CONFIG, d, tau), d + tau)
    q = orthogonal(n, 3)
    np.testing.assert_allclose(merged_one(CONFIG, d @ q, tau @ q), d @ q + tau @ q, rtol=0, atol=RATE)


def test_losses_fall_and_steps_are_bounded():
    """The matrices of few rows are through after a few steps, and then swing."""
    steps = states(CONFIG, TASKS)
    for t in (1, 2):
        for name in MATRICES:
            losses = np.asarray(steps[t].report[name].losses)
            assert losses.shape == (STEPS + 1,)
            assert np.all(np.diff(losses) < 0) if min(TOWER[name]) > 2 else losses[-1] < losses[0]
            moved = np.abs(steps[t].delta[name] - np.asarray(steps[t - 1].delta[name]) - TASKS[t][name])
            assert RATE < moved.max() <= 3.2 * STEPS * RATE


def test_two_tasks_may_be_swapped():
    one, other = merged(CONFIG, *TASKS[:2]), merged(CONFIG, *TASKS[1::-1])
    for name in TOWER:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=2e-8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_permutations_and_negation_commute(shape):
    (d, tau), rng = pair(shape), np.random.default_rng(5)
    rows, columns = rng.permutation(shape[0]), rng.permutation(shape[1])
    whole = merged_one(CONFIG, d, tau)
    permuted = merged_one(CONFIG, d[rows][:, columns], tau[rows][:, columns])
    np.testing.assert_allclose(permuted, whole[rows][:, columns], rtol=0, atol=2e-8)
    np.testing.assert_array_equal(merged_one(CONFIG, -d, -tau), -whole)


def test_hidden_units_may_be_renumbered():
    """The rows of one layer together with the columns of the next."""
    order = np.random.default_rng(5).permutation(19)
    inner, outer = (next(n for n in TOWER if n.endswith(part)) for part in ("fc1.weight", "fc2.weight"))

    def renumbered(model):
        return model | {inner: model[inner][order], outer: model[outer][:, order]}

    plain, other = renumbered(merged(CONFIG, *TASKS)), merged(CONFIG, *map(renumbered, TASKS))
    for name in TOWER:
        np.testing.assert_allclose(other[name], plain[name], rtol=0, atol=2e-8)


def test_rows_evolve_on_their_own():
    """A rotation among the other rows keeps XᵀX, and so all that row 0 sees of them."""
    d, tau = pair((9, 12))
    mixed_d, mixed_tau = d.copy(), tau.copy()
    mixed_d[1:], mixed_tau[1:] = orthogonal(8, 1) @ d[1:], orthogonal(8, 2) @ tau[1:]
    one, other = merged_one(CONFIG, d, tau), merged_one(CONFIG, mixed_d, mixed_tau)
    np.testing.assert_allclose(other[0], one[0], rtol=0, atol=2e-8)
    assert np.abs(other[1:] - one[1:]).max() > 1e-3


def test_zero_updates_drop_out():
    d, tau = pair((6, 5))
    zero = np.zeros_like(d)
    [_, empty], [_, alone], [_, kept] = (states(CONFIG, of_one(*x)) for x in ((zero, zero), (zero, tau), (d, zero)))
    name = Q.format(0)
    np.testing.assert_array_equal(empty.delta[name], zero)
    np.testing.assert_array_equal(alone.delta[name], tau)
    np.testing.assert_array_equal(kept.delta[name], d)
    for state in (empty, alone, kept):
        np.testing.assert_array_equal(state.report[name].losses, np.zeros(STEPS + 1))


def test_without_steps_the_sum_is_left():
    d, tau = pair((6, 5))
    state = states(WudiConfig(steps=0), of_one(d, tau))[-1]
    np.testing.assert_array_equal(state.delta[Q.format(0)], d + tau)
    assert float(state.report[Q.format(0)].losses[0]) == pytest.approx(oracle.wudi_loss(d + tau, d, tau), rel=1e-5)


def test_a_layer_does_not_feel_those_beside_it():
    d, tau = pair((12, 12))
    loud = pair((12, 12), seed=1, scale=10.0)
    alone = merged_one(CONFIG, d, tau)
    beside = merged(CONFIG, *({Q.format(0): x, Q.format(1): y} for x, y in zip((d, tau), loud, strict=True)))
    np.testing.assert_allclose(beside[Q.format(0)], alone, rtol=0, atol=2e-8)


@pytest.mark.parametrize("shape", [(4000, 8), (8, 4000)], ids=str)
def test_no_square_of_the_long_side_is_ever_formed(shape):
    d = jax.ShapeDtypeStruct(shape, np.float32)
    program = jax.jit(functools.partial(wudi._layer, config=CONFIG))
    memory = program.lower(d, d, jax.ShapeDtypeStruct((), bool)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4000 * 4000 / 10


def test_progress_tells_of_every_stack():
    told = []
    tasks = [draw(T5, seed) for seed in (1, 2)]
    rule = methods.get("wudi", dataclasses.replace(CONFIG, variant="text"))
    state = rule.update(rule.init(tasks[0]), tasks[0], on_stack=lambda *news: told.append(news))
    assert told == []
    rule.update(state, tasks[1], on_stack=lambda *news: told.append(news))
    shapes = {text: report.losses.shape for text, report in told}
    assert shapes == {"1 matrices of 40 x 8": (1, STEPS + 1), "1 matrices of 8 x 8": (1, STEPS + 1)}


def test_a_solution_that_is_not_finite_is_named():
    tasks = [draw(TOWER, seed) for seed in (1, 2)]
    tasks[1][Q.format(1)][0, 0] = np.nan
    with pytest.raises(SolveError) as error:
        states(CONFIG, tasks)
    assert [problem.tensor for problem in error.value.problems] == [Q.format(1)]


def test_the_second_task_compiles_nothing():
    states(CONFIG, TASKS[:2])
    before = matrices._program._cache_size()
    states(CONFIG, TASKS)
    assert matrices._program._cache_size() == before
