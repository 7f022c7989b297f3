import itertools

import chex
import jax
import numpy as np
import oracle_magmax as oracle
import pytest

from nufilt_jax import methods
from nufilt_jax.methods import magmax as rule_file
from nufilt_jax.methods.magmax import MagmaxConfig

EPS = np.finfo(np.float32).eps
SHAPES = {
    "layers.0.q_proj.weight": (8, 8),
    "layers.1.q_proj.weight": (8, 8),
    "layers.0.fc1.weight": (12, 8),
    "layers.0.fc2.weight": (8, 12),
    "layers.0.fc1.bias": (12,),
    "patch.weight": (4, 3, 2, 2),
    "embed.weight": (1, 9),
}
BASE = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}  # zero: θ_t is τ_t, to the last bit
VARIANTS = ["code", "text"]


def task(seed, scale=0.01):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


TASKS = [task(seed) for seed in range(3)]


def merge(tasks, base=BASE, **settings):
    rule = methods.get("magmax", MagmaxConfig(**settings))
    state = rule.init(base)
    for each in tasks:
        state = rule.update(state, each)
    return state


def delta(tasks, **settings):
    return jax.tree.map(np.asarray, dict(merge(tasks, **settings).delta))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [0.5, 0.3, -0.7])
@pytest.mark.parametrize("n_tasks", [1, 2, 5])
def test_steps_are_the_oracles(variant, scale, n_tasks):
    tasks = [*TASKS, BASE, task(4, scale=0.02)][:n_tasks]
    want = {name: oracle.merge([each[name] for each in tasks], scale, variant) for name in SHAPES}
    atol = n_tasks * EPS * max(np.abs(x).max() for x in want.values())  # text: a sum of terms that may cancel
    chex.assert_trees_all_close(delta(tasks, scale=scale, variant=variant), want, rtol=2 * EPS, atol=atol)


@pytest.mark.parametrize("scale", [0.5, 0.3])
def test_the_order_of_tasks_does_not_matter(scale):
    results = [delta(order, scale=scale) for order in itertools.permutations(TASKS)]
    for other in results[1:]:
        chex.assert_trees_all_equal(results[0], other)
    largest = {name: np.max([np.abs(each[name]) for each in TASKS], axis=0) for name in SHAPES}
    want = {name: np.float32(scale) * x for name, x in largest.items()}
    chex.assert_trees_all_equal({name: np.abs(x) for name, x in results[0].items()}, want)


def test_the_order_matters_if_maxima_add_up():
    ahead, back = (delta(order, variant="text") for order in (TASKS, TASKS[::-1]))
    assert not np.allclose(ahead["layers.0.q_proj.weight"], back["layers.0.q_proj.weight"], atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [0.5, 0.3, 0.1, 1 / 3])
def test_of_equal_magnitudes_the_newest_task_wins(variant, scale):
    """τ, then −τ. D/λ is not τ again for most scales, and would make some of the older entries larger."""
    rng = np.random.default_rng(0)
    tau = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    entries = np.concatenate([x.ravel() for x in tau.values()])
    if scale != 0.5:
        assert np.any(np.abs(np.float32(scale) * entries / np.float32(scale)) > np.abs(entries))
    opposite = {name: -x for name, x in tau.items()}
    got = delta([tau, opposite], scale=scale, variant=variant)
    want = {name: (-np.float32(scale) if variant == "code" else np.float32(0)) * x for name, x in tau.items()}
    # text: λ τ − λ τ, which one fused multiply-add leaves at the rounding of the product
    chex.assert_trees_all_close(got, want, rtol=0, atol=0 if variant == "code" else EPS * np.abs(entries).max())


@pytest.mark.parametrize("scale", [0.5, 0.3, 0.1])
def test_equal_tasks_give_one_of_them(scale):
    want = {name: np.float32(scale) * x for name, x in TASKS[0].items()}
    chex.assert_trees_all_equal(delta([TASKS[0]] * 6, scale=scale), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_scale_zero_the_base_stays(variant):
    state = merge(TASKS, base=BASE, scale=0.0, variant=variant)
    for name in SHAPES:
        np.testing.assert_array_equal(state.delta[name], 0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("factor", [4.0, -2.0])
def test_a_common_factor_of_all_tasks_comes_through(variant, factor):
    scaled = [{name: np.float32(factor) * x for name, x in each.items()} for each in TASKS]
    want = {name: np.float32(factor) * x for name, x in delta(TASKS, variant=variant).items()}
    chex.assert_trees_all_equal(delta(scaled, variant=variant), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_but_the_tensor_that_differs_moves(variant):
    for name in SHAPES:
        state = merge([BASE | {name: each[name]} for each in TASKS], variant=variant)
        assert {key for key in SHAPES if np.any(state.merged[key] != 0)} == {name}


def test_the_first_model_is_taken_in_part():
    base = task(9, scale=1.0)
    first = {name: base[name] + x for name, x in TASKS[0].items()}
    for variant in VARIANTS:
        merged = merge([first], base=base, variant=variant).merged
        chex.assert_trees_all_close(merged, {n: (base[n] + first[n]) / 2 for n in SHAPES}, rtol=2 * EPS, atol=EPS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_that_went_through_files_continues_alike(variant):
    rule = methods.get("magmax", MagmaxConfig(variant=variant, scale=0.3))
    for n_tasks in (1, 2):
        state = merge(TASKS[:n_tasks], variant=variant, scale=0.3)
        assert bool(state.extra) == (variant == "text")
        leaves, structure = jax.tree.flatten(state)
        restored = jax.tree.unflatten(structure, [np.array(x) for x in leaves])
        straight, again = rule.update(state, TASKS[2]), rule.update(restored, TASKS[2])
        chex.assert_trees_all_equal(straight.merged, again.merged)
        chex.assert_trees_all_equal(straight.extra, again.extra)
        chex.assert_trees_all_equal(jax.tree.leaves(state), leaves)


def test_later_tasks_and_other_scales_compile_nothing():
    programs = rule_file._replace, rule_file._accumulate
    for variant in VARIANTS:
        merge(TASKS, variant=variant)
    before = [program._cache_size() for program in programs]
    for variant in VARIANTS:
        merge([*TASKS, *TASKS], variant=variant, scale=0.2)
    assert [program._cache_size() for program in programs] == before


def test_the_new_d_takes_the_memory_of_the_old():
    stacks = tuple(jax.ShapeDtypeStruct(shape, np.float32) for shape in [(4, 64, 64), (3, 64)])
    size = sum(4 * np.prod(x.shape) for x in stacks)
    scale = jax.ShapeDtypeStruct((), np.float32)
    memory = rule_file._replace.lower(stacks, stacks, scale).compile().memory_analysis()
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 16
