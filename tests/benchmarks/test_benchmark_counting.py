"""Formulas against what the stages execute, and the counter itself against loops and branches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.common import shapes
from benchmarks.common.counting import counted
from benchmarks.speed import package_solve
from nufilt_jax.core import solve
from nufilt_jax.engine import counts
from nufilt_jax.engine.counts import Work, product
from nufilt_jax.methods.nufilt import NufiltConfig

CONFIG = NufiltConfig(filter_rank=6, adapter_rank=5, task_rank=2, steps=3, decomposition="svd")


def a_product(x):
    return jnp.matmul(x, x.T)


X = np.ones((3, 4), np.float32)
ONE = product(3, 4, 3)


def test_a_product():
    assert Work(2 * 3 * 4 * 3, 4 * (12 + 12 + 9)) == ONE
    assert counted(a_product, X) == ONE


def test_a_batch_of_products():
    assert counted(jax.vmap(a_product), np.stack([X, X])) == ONE.times(2)


def test_loops_count_by_turn():
    def loop(x, turns):
        return jax.lax.while_loop(lambda c: c[0] < turns, lambda c: (c[0] + 1, c[1] + a_product(x)), (0, jnp.eye(3)))

    assert counted(loop, X, jnp.int32(5)).flops == 5 * ONE.flops
    rows = np.stack([X] * 4)
    assert counted(lambda x: jax.lax.map(a_product, x), rows) == ONE.times(4)
    assert counted(lambda x: jax.lax.scan(lambda c, r: (c, a_product(r)), 0, x, reverse=True), rows) == ONE.times(4)


@pytest.mark.parametrize("taken", [True, False])
def test_branches_count_as_taken(taken):
    def branch(x, flag):
        return jax.lax.cond(flag, a_product, lambda x: x[:, :3], x)

    assert counted(branch, X, jnp.asarray(taken)) == (ONE if taken else Work())


def test_library_calls():
    square = np.eye(6, dtype=np.float32)
    assert counted(jnp.linalg.eigh, square).flops == pytest.approx(6 * 6**3)
    assert counted(jnp.linalg.svd, np.ones((4, 6), np.float32)).flops == pytest.approx(6 * 6 * 4**2 + 20 * 4**3)
    assert counted(jnp.linalg.cholesky, square).flops == pytest.approx(6**3 / 3)
    solved = counted(lambda a, b: jax.scipy.linalg.solve_triangular(a, b), square, np.ones((6, 2), np.float32))
    assert solved.flops == pytest.approx(6**2 * 2)


@functools.cache
def stages_of(shape):
    """A stage's executed work on one layer, and the layer's earlier results."""
    [task] = package_solve.to_device(shapes.inputs({"layer": shape}, CONFIG.adapter_rank))
    results, found = [], {}
    for name, (function, takes) in package_solve._stage_functions(CONFIG).items():
        args = takes(task, results)
        results.append(function(*args))
        found[name] = counted(function, *args)
    return found


@pytest.mark.parametrize("shape", [(20, 12), (12, 12), (5, 16)], ids=str)
def test_formulas(shape):
    found = stages_of(shape)
    factored = 2 * shape[0] < shape[1]
    assert found["reduce"] == counts.reduce_count(*shape, CONFIG, factored=factored)
    assert found["fuse"] == counts.fuse_count(*shape, CONFIG)
    adam = counts.adam_count(*shape, CONFIG, factored=factored)
    trained = 2 * shape[1] * CONFIG.adapter_rank * CONFIG.steps
    # The elementwise update is no product: the formula alone has it.
    assert found["adam"] == Work(adam.flops - counts.ADAM_FLOPS * trained, adam.bytes - 4 * 7 * trained)


def test_stages_together_are_the_solve():
    [task] = package_solve.to_device(shapes.inputs({"layer": (20, 12)}, CONFIG.adapter_rank))
    whole = counted(lambda *arrays: solve.solve_group(*arrays, config=CONFIG), *task)
    assert whole.flops == pytest.approx(sum(part.flops for part in stages_of((20, 12)).values()), rel=1e-5)
