import dataclasses

import numpy as np
import oracle_knots
import oracle_ties
import pytest

from nufilt_jax import methods
from nufilt_jax.errors import SolveError
from nufilt_jax.methods import knots
from nufilt_jax.methods.knots import KnotsConfig

BLOCK = "vision_model.encoder.layers.0."
Q, OUT, FC1, FC2 = (
    f"{BLOCK}{name}.weight" for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
)
BIAS, NORM = f"{BLOCK}mlp.fc1.bias", f"{BLOCK}layer_norm1.weight"
POSITION, PATCH = "vision_model.embeddings.position_embedding.weight", "vision_model.embeddings.patch_embedding.weight"
SHAPES = {
    # [D, τ] of the first feed-forward layer is taller than wide, of all others wider than tall.
    **{Q: (12, 12), OUT: (1, 12), FC1: (30, 12), FC2: (12, 30)},
    **{BIAS: (30,), NORM: (12,), POSITION: (5, 12), PATCH: (12, 3, 2, 2)},
}
LINEAR = {Q, OUT, FC1, FC2}
CONFIG = KnotsConfig(scale=0.4, density=0.3)


def model(seed, base=None, rank=None):
    """With `rank`, matrices differ from the base's by that rank, as LoRA makes them."""
    rng = np.random.default_rng(seed)
    if base is None:
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    params = {}
    for name, x in base.items():
        step = rng.normal(size=x.shape)
        if rank is not None and x.ndim == 2:
            step = rng.normal(size=(x.shape[0], rank)) @ rng.normal(size=(rank, x.shape[1]))
        params[name] = (x + 0.2 * step).astype(np.float32)
    return params


BASE = model(0)
TASKS = [model(seed, BASE) for seed in (1, 2, 3)]
LORA = [model(seed, BASE, rank=2) for seed in (1, 2, 3)]


def merge(tasks, base=BASE, **changes):
    rule = methods.get("knots", dataclasses.replace(CONFIG, **changes))
    state = rule.init(base)
    for task in tasks:
        state = rule.update(state, task)
    return state


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0, 30])
@pytest.mark.parametrize(
    ("tasks", "cutoff"),
    [(TASKS, 1e-4), (TASKS, 1e-9), (TASKS, 1.0), (LORA, 1e-4), (LORA, 1.0), ([LORA[0], TASKS[1]], 1e-4)],
    ids=["full rank", "full rank by SVD", "full rank cut", "rank 2", "rank 2 cut", "mixed"],
)
def test_merges_equal_the_oracle(tasks, density, cutoff):
    rule = methods.get("knots", dataclasses.replace(CONFIG, density=density, cutoff=cutoff))
    state = rule.update(rule.init(BASE), tasks[0])
    for task in tasks[1:]:
        before, state = state, rule.update(state, task)
        assert set(state.delta) == LINEAR
        for name in LINEAR:
            # From the D that the rule itself had: its rounding may turn an entry at a threshold, which is worth 1e-2.
            d, tau = np.asarray(before.delta[name]), task[name] - BASE[name]
            expected = d + 0.4 * oracle_knots.update(d, tau, density=density, cutoff=cutoff)
            np.testing.assert_allclose(state.delta[name], expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_the_first_task_is_scaled_and_not_trimmed():
    state = merge(TASKS[:1])
    for name in LINEAR:
        np.testing.assert_array_equal(state.delta[name], np.float32(0.4) * (TASKS[0][name] - BASE[name]))


def test_what_is_no_linear_layer_neither_moves_nor_matters():
    state = merge(TASKS[:2])
    for name in SHAPES:
        other = merge([TASKS[0], TASKS[1] | {name: TASKS[1][name] + np.float32(0.1)}])
        moved = {key for key in SHAPES if not np.array_equal(other.merged[key], state.merged[key])}
        assert moved == {name} & LINEAR
    for name in SHAPES.keys() - LINEAR:
        np.testing.assert_array_equal(state.merged[name], BASE[name])


@pytest.mark.parametrize("tasks", [TASKS, LORA], ids=["full rank", "rank 2"])
def test_the_same_task_twice_has_a_closed_form(tasks):
    """D_2 = λ τ + λ (1 + λ) U diag(σ) trim(Vᵀ), with the SVD of τ."""
    state = merge([tasks[0]] * 2)
    for name in LINEAR:
        tau = (tasks[0][name] - BASE[name]).astype(np.float64)
        u, s, vt = np.linalg.svd(tau, full_matrices=False)
        u, s, vt = u[:, s > 1e-4], s[s > 1e-4], vt[s > 1e-4]
        trimmed = oracle_ties.trim(vt.ravel(), 0.3).reshape(vt.shape)
        expected = 0.4 * tau + 0.4 * 1.4 * (u * s) @ trimmed
        np.testing.assert_allclose(state.delta[name], expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_tasks_below_the_cutoff_change_nothing():
    tiny = [{name: x + np.float32(1e-6) for name, x in BASE.items()} for _ in range(2)]
    zero = {name: np.zeros_like(x) for name, x in BASE.items()}
    small = [{name: 1e-6 * x for name, x in task.items()} for task in tiny]
    state = merge(small, base=zero)
    for name in LINEAR:
        np.testing.assert_array_equal(state.delta[name], np.float32(0.4) * small[0][name])
    assert all(np.any(state.delta[name]) for name in LINEAR)


def test_scaling_all_task_vectors_scales_the_result():
    """By a power of two and from a base of zeros, so that no rounding turns an entry at a threshold."""
    base = {name: np.zeros_like(x) for name, x in BASE.items()}
    small = merge(TASKS, base)
    large = merge([{name: 8 * x for name, x in task.items()} for task in TASKS], base)
    for name in LINEAR:
        np.testing.assert_array_equal(large.delta[name], 8 * np.asarray(small.delta[name]))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_task_that_learned_nothing_leaves_the_other_trimmed(frozen):
    """TIES(0, y) = trim(y): all that is kept of C = [0, τ] or [λ τ, 0] is its largest coordinates."""
    tasks = [TASKS[0], TASKS[1]]
    tasks[frozen] = BASE
    state = merge(tasks)
    for name in LINEAR:
        tau = (tasks[1 - frozen][name] - BASE[name]).astype(np.float64)
        d = np.zeros_like(tau) if frozen == 0 else 0.4 * tau
        u, s, vt = np.linalg.svd(tau if frozen == 0 else d, full_matrices=False)
        expected = d + 0.4 * (u * s) @ oracle_ties.trim(vt.ravel(), 0.3).reshape(vt.shape)
        np.testing.assert_allclose(state.delta[name], expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def matrix(shape, seed, rank=None):
    rng = np.random.default_rng(seed)
    rank = min(shape) if rank is None else rank
    return (rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))).astype(np.float32)


@pytest.mark.parametrize("cutoff", [1e-2, 1e-3, 0.0])
@pytest.mark.parametrize("rank", [None, 3, 0])
@pytest.mark.parametrize("shape", [(40, 12), (24, 12), (9, 12), (1, 12), (12, 1)], ids=str)
def test_a_basis_reproduces_both_operands(shape, rank, cutoff):
    rank = rank if rank is None else min(rank, *shape)
    d, tau = matrix(shape, 1, rank), matrix(shape, 2, rank)
    found = knots.basis(d, tau, cutoff=cutoff, density=0.2)
    c = np.hstack([d, tau])
    size = max(np.abs(c).max(), 1)
    np.testing.assert_allclose(found.left @ found.right, c, rtol=0, atol=1e-6 * size)
    n_kept = int(np.any(found.right, axis=1).sum())
    if cutoff:
        assert n_kept == np.linalg.matrix_rank(c.astype(np.float64), tol=cutoff)
    rows = found.right[np.any(found.right, axis=1)].astype(np.float64)
    np.testing.assert_allclose(rows @ rows.T, np.eye(n_kept), atol=1e-6)
    kept = int(0.2 * n_kept * shape[1])
    assert found.order == found.right.shape[0] * shape[1] - kept
    assert (found.left.dtype, found.right.dtype) == (np.float32, np.float32)


def test_the_basis_is_that_of_an_svd_down_to_the_cutoff():
    """Eigenvectors of C Cᵀ are used, and are good enough, down to 1e-5 of the largest singular value."""
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.normal(size=(40, 40)))[0], np.linalg.qr(rng.normal(size=(120, 40)))[0]
    s = np.r_[1, np.geomspace(0.9, 1.1e-4, 30), np.geomspace(0.9e-4, 1e-9, 9)]
    c = (u * s) @ v.T
    found = knots.wide_svd(c, 1e-4)
    order = np.argsort(-found[1])[:31]
    np.testing.assert_allclose(found[1][order], s[:31], rtol=1e-11)
    assert np.all(np.delete(found[1], order) < 1e-4)
    np.testing.assert_allclose(np.abs(np.sum(found[2][order] * v.T[:31], axis=1)), 1, atol=1e-12)
    # Errors of C Cᵀ over the smallest σ² times 40: still less than the cast to float32 adds.
    np.testing.assert_allclose(found[2][order] @ found[2][order].T, np.eye(31), atol=5e-8)


def test_signs_and_order_of_the_basis_and_of_the_operands_do_not_matter():
    d, tau = matrix((9, 12), 1), matrix((9, 12), 2)
    left, right, order = knots.basis(d, tau, cutoff=1e-4, density=0.3)
    expected = knots._aligned_ties(left, right, order)
    signs, turn = np.float32([1, -1, -1, 1, 1, -1, 1, -1, 1]), np.random.default_rng(0).permutation(9)
    other = knots._aligned_ties((left * signs)[:, turn], (right * signs[:, None])[turn], order)
    np.testing.assert_allclose(other, expected, atol=1e-5)
    swapped = knots._aligned_ties(*knots.basis(tau, d, cutoff=1e-4, density=0.3))
    np.testing.assert_allclose(swapped, expected, atol=1e-5)


def test_every_layer_that_is_not_finite_is_named():
    broken = TASKS[1] | {name: TASKS[1][name] + np.float32(np.nan) for name in (Q, FC1)}
    with pytest.raises(SolveError) as error:
        merge([TASKS[0], broken])
    assert {problem.tensor for problem in error.value.problems} == {Q, FC1}


def test_no_later_task_compiles_anything_whatever_its_rank():
    rule = methods.get("knots", CONFIG)
    state = rule.update(rule.update(rule.init(BASE), TASKS[0]), TASKS[1])
    programs = (knots._aligned_ties, knots._add)
    before = [program._cache_size() for program in programs]
    for task in (TASKS[2], LORA[0], BASE):
        state = rule.update(state, task)
    assert [program._cache_size() for program in programs] == before
