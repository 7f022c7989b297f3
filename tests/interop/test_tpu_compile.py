"""The solve, compiled for TPUs that are not there: libtpu does it on any machine."""

import functools
import re

import jax
import jax.numpy as jnp

from benchmarks.speed import tpu_compile
from nufilt_jax import NufiltConfig
from nufilt_jax.core.solve import solve_group
from nufilt_jax.methods.stacked import group_layers

# By a route of products alone, as all wide layers take it; two stacks of one width.
SHAPES = {"a": (384, 384), "b": (768, 384)}
PRODUCTS, LOOPS = 154, 7


def group_of(n_layers):
    sizes = {f"{name}{i}": shape for name, shape in SHAPES.items() for i in range(n_layers)}
    [group] = group_layers(sizes)
    return group, sizes


def test_the_solve_compiles():
    group, sizes = group_of(2)
    found = tpu_compile.compile_group(group, sizes, tpu_compile.describe("v5e"))
    assert "f64[" not in found.program.as_text()
    # Each costs seconds of compiling at true sizes.
    assert (tpu_compile.n_products(found.program), tpu_compile.n_loops(found.program)) == (PRODUCTS, LOOPS)
    row = tpu_compile.row("small", "v5e", "main", 4, found)
    assert row[tpu_compile.COLUMNS.index("fits")] == "yes"


def test_no_loop_runs_over_layers():
    """However many there are, it is the same operations, all products in float32."""

    def operations(n_layers):
        stacks = tuple(jnp.zeros((n_layers, *shape)) for shape in SHAPES.values())
        start = jnp.zeros((2 * n_layers, 64, 384))
        solve = functools.partial(solve_group, config=NufiltConfig(), add=True, until_certified=False)
        text = jax.jit(solve).trace(stacks, stacks, start).lower(lowering_platforms=("tpu",)).as_text()
        dots = re.findall(r"stablehlo\.dot_general .*", text)
        assert dots and all("precision = [HIGHEST, HIGHEST]" in dot for dot in dots)
        return len(dots), text.count("stablehlo.while")

    assert operations(2) == operations(12)
