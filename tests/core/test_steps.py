"""The paper's steps one by one: the filter, the adapter's objective and start, the fusion."""

import functools

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import oracle
import pytest

from nufilt_jax.core.adapt import Adapter, Objective, loss_and_gradients, normal_start, reduced_objective
from nufilt_jax.core.filter import authors_first_filter, null_space_filter, target
from nufilt_jax.core.fuse import fuse
from nufilt_jax.core.solve import solve_group
from nufilt_jax.core.stages import train
from nufilt_jax.linalg.grams import GramFactor, GramMatrix
from nufilt_jax.methods.nufilt import NufiltConfig

CONFIG = NufiltConfig(filter_rank=2, adapter_rank=4, task_rank=2, steps=2)


@pytest.mark.parametrize("right_factor", ["P + BA", "I + BA", "BA"])
@pytest.mark.parametrize("unit", [1.0, 0.25])
@pytest.mark.parametrize(
    "held",
    [lambda tau, unit: GramMatrix(unit**2 * tau.T @ tau, unit), GramFactor],
    ids=["formed", "factor"],
)
def test_gradients_are_those_of_the_unreduced_objective(held, unit, right_factor):
    rng = np.random.default_rng(0)
    d, tau = (matrices.power_law((40, 32), seed=s, scale=0.5) for s in (1, 2))
    v2, v1 = oracle.leading(d, 6), oracle.leading(tau, 4)
    a, b = rng.normal(size=(5, 32)) * 0.1, rng.normal(size=(32, 5)) * 0.1
    p = {"P + BA": oracle.projector(d, 6), "I + BA": np.eye(32), "BA": np.zeros((32, 32))}[right_factor]
    grad_a, grad_b = oracle.gradients(d.astype(float), tau.astype(float), p, b, a, v1, v2)
    merged, task, prior, new = (jnp.asarray(x, jnp.float32) for x in (d, tau, v2, v1))
    wanted = unit * target(right_factor, merged, task, prior, new).wanted
    gram = held(task, jnp.full((1, 1), 2.0, jnp.float32))  # in a unit of its own
    objective = reduced_objective(gram, task, wanted, prior, new, jnp.float32(unit))
    loss, found = loss_and_gradients(objective, Adapter(jnp.asarray(a.T, jnp.float32), jnp.asarray(b, jnp.float32)))
    loss, found = loss / unit**2, [x / unit**2 for x in found]
    assert float(loss) == pytest.approx(oracle.loss(d, tau, p, b, a, v1, v2), rel=1e-5)
    for one, other in zip(found, (grad_a.T, grad_b), strict=True):
        assert matrices.relative_error(one, other) < 1e-5


@pytest.mark.parametrize("right_factor", ["P + BA", "I + BA", "BA"])
def test_filter_and_fuse_never_need_the_projector(right_factor):
    rng = np.random.default_rng(0)
    tau = rng.normal(size=(12, 10)).astype(np.float32)
    v2 = matrices.orthonormal(rng, 10, 3).astype(np.float32)
    a, b = rng.normal(size=(2, 10)).astype(np.float32), rng.normal(size=(10, 2)).astype(np.float32)
    filtered, removed = null_space_filter(jnp.asarray(tau), jnp.asarray(v2))
    projector = np.eye(10) - v2 @ v2.T
    np.testing.assert_allclose(filtered, tau @ projector, atol=1e-5)
    np.testing.assert_allclose(removed, tau @ v2, atol=1e-6)
    kept = {"P + BA": projector, "I + BA": np.eye(10), "BA": np.zeros((10, 10))}[right_factor]
    fused = fuse(right_factor, jnp.asarray(tau), Adapter(jnp.asarray(a.T), jnp.asarray(b)), jnp.asarray(v2))
    np.testing.assert_allclose(fused.update, tau @ (kept + b @ a), atol=1e-5)
    taken_away = np.sum((tau @ v2) ** 2) if right_factor == "P + BA" else 0
    np.testing.assert_allclose(fused.removed, np.sqrt(taken_away), rtol=1e-5)
    np.testing.assert_allclose(fused.restored, np.linalg.norm(tau @ b @ a), rtol=1e-4)
    np.testing.assert_allclose(fused.felt, tau @ b @ a @ v2, atol=1e-5)


def test_the_authors_first_task_loses_its_first_coordinates():
    x = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(authors_first_filter(x, 2), x.at[:, :2].set(0))


def test_a_start_depends_on_its_key_alone():
    keys = jnp.asarray([[1, 2], [3, 4]], jnp.uint32)
    together = jax.vmap(lambda key: normal_start(key, 4, 500))(keys)
    np.testing.assert_array_equal(together[1], normal_start(keys[1], 4, 500))
    assert not np.array_equal(together[0], together[1])
    assert float(jnp.std(together)) == pytest.approx(0.02, rel=0.05)


def objective_of(layers, width=8):
    columns, each = jnp.ones((layers, width, 2)), jnp.ones(layers)
    gram = GramMatrix(jnp.ones((layers, width, width)), jnp.ones((layers, 1, 1)))
    return Objective(each, gram, columns, each, columns, columns)


@pytest.mark.parametrize("layers", [2, 4])
def test_stages_with_different_layers_do_not_meet(layers):
    """A start for every layer, no more and no fewer: `vmap` alone would say so in words of its own."""
    with pytest.raises(AssertionError, match="shape"):
        train(objective_of(3), jnp.ones((layers, 4, 8)), config=CONFIG)


@pytest.mark.parametrize(
    ("task", "start"), [((2, 6, 8), (2, 3, 8)), ((2, 5, 8), (3, 4, 8)), ((3, 5, 8), (2, 4, 8))], ids=str
)
def test_arrays_that_are_no_group_are_found_while_tracing(task, start):
    shapes = [(jax.ShapeDtypeStruct((2, 5, 8), jnp.float32),), (jax.ShapeDtypeStruct(task, jnp.float32),)]
    with pytest.raises(AssertionError):
        jax.eval_shape(functools.partial(solve_group, config=CONFIG), *shapes, jax.ShapeDtypeStruct(start, jnp.float32))
