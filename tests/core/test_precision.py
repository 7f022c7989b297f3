"""Matrix products in full float32, read from the programs themselves; and choices that numbers alone hardly show."""

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import pytest

from nufilt_jax import NufiltConfig, methods
from nufilt_jax.core import solve
from nufilt_jax.linalg import chebyshev
from nufilt_jax.linalg.refine import refine
from nufilt_jax.methods.null_space import NullSpaceConfig

HIGHEST = jax.lax.Precision.HIGHEST
SMALL = {"filter_rank": 4, "adapter_rank": 2, "task_rank": 2, "steps": 2}


def products(jaxpr):
    """The precision of every matrix product of a program, those of its loops and branches included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def assert_highest(program, *arguments):
    found = list(products(jax.make_jaxpr(program)(*arguments).jaxpr))
    assert found and all(precision in (HIGHEST, (HIGHEST, HIGHEST)) for precision in found)


@pytest.mark.parametrize("shape", [(320, 320), (64, 64), (40, 320)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"solver": "closed_form"}, {"decomposition": "svd"}], ids=str)
def test_every_product_of_a_solve_is_of_the_highest_precision(shape, settings):
    config = NufiltConfig(**SMALL, **settings)
    x = jnp.zeros((2, *shape), jnp.float32)
    start = jnp.zeros((2, config.trained_rank, shape[1]), jnp.float32)
    assert_highest(lambda d, t, a: solve.solve_group((d,), (t,), a, config=config), x, x, start)


@pytest.mark.parametrize("name", ["nufilt", "null_space", "adapter_only", "iso_c", "opcm", "tsv_m", "wudi"])
def test_every_product_of_a_method_is_of_the_highest_precision(name):
    ranks = {"nufilt": NufiltConfig(**SMALL), "null_space": NullSpaceConfig(filter_rank=4)}
    rule = methods.get(name, ranks.get(name))
    base = {"model.layers.0.self_attn.q_proj.weight": jnp.zeros((8, 8), jnp.float32)}
    state = jax.tree.map(jnp.asarray, rule.update(rule.init(base), {key: x + 1 for key, x in base.items()}))
    assert_highest(rule.update, state, base)


def test_every_product_of_knots_is_of_the_highest_precision():
    from nufilt_jax.methods import knots

    zeros = [jnp.zeros(shape, jnp.float32) for shape in ((4, 3), (3, 8))]
    assert_highest(knots._aligned_ties, *zeros, jnp.uint32(1))


@pytest.mark.parametrize("degree", [5, 16, 32])
def test_products_of_the_first_chebyshev_factors_stay_small(degree):
    """In Leja's order, what the polynomial's first factors make of the interval is as small as any could make it."""
    roots = chebyshev._chebyshev_roots(degree)
    x = np.linspace(-1, 1, 2001)
    for k in range(1, degree + 1):
        largest = np.abs(np.prod(x[:, None] - roots[None, :k], axis=1)).max()
        assert largest * 2**k < 8 * k  # an interval of length 4 has capacity 1


def test_what_is_missing_is_estimated_for_the_middle_of_the_spectrum_outside():
    """Of outside directions of eigenvalue λ, from 0 to the least in the block, as much is left at either end."""
    tilt, rng = 1e-3, np.random.default_rng(0)
    squares = np.array([1.0, 0.9, 0.5, 0.499, 1e-6, 1e-6, 1e-6, 1e-6])
    x = (matrices.orthonormal(rng, 8, 8) * np.sqrt(squares)).astype(np.float32)
    block = np.eye(8)[:, :3]
    block[3, 0] = block[4, 1] = tilt
    block /= np.linalg.norm(block, axis=0)
    found = refine(jnp.asarray(x), jnp.asarray(block, jnp.float32), 2)
    kept = np.asarray(found.block[:, :2], np.float64)
    left = np.linalg.norm(kept - np.eye(8)[:, :3] @ (np.eye(8)[:, :3].T @ kept), axis=0) / tilt
    # (least / 2) / (σ² - least / 2): a third and 0.38; an estimate for either end leaves 0.5 and more in one of them.
    assert (left < 0.42).all()
