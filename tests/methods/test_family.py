"""What every merging rule has to hold, or is known not to (spec of the baselines, §15)."""

import dataclasses

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from merging import (
    BASE,
    BIAS,
    BLOCKS,
    CLASS,
    CONFIGS,
    FC1,
    FC2,
    INNER,
    NORM,
    PATCH,
    POSITION,
    SELECTED,
    TASKS,
    WIDTH,
    Q,
    change,
    merge,
    moved,
    rule_for,
    update,
)

from nufilt_jax import methods
from nufilt_jax.checkpoints import from_flax
from nufilt_jax.errors import SolveError
from nufilt_jax.methods.knots import KnotsConfig
from nufilt_jax.methods.selection import Selection

FLOATS = {name for name, x in BASE.items() if x.dtype == np.float32}
ATTENTION = {name for name in BASE if ".self_attn." in name}
LINEAR = set(SELECTED) | {FC2.format(i) for i in range(BLOCKS)}
TOUCHED = {name: FLOATS for name in methods.RULES} | {
    **{name: set(SELECTED) for name in ("nufilt", "null_space", "sum", "adapter_only")},
    "knots": LINEAR,
    "wemoe": ATTENTION,  # its experts are parameters of their own
}
ORDER_FREE = ("sum", "weight_average", "task_arithmetic", "magmax")
SWAP_FREE = (*ORDER_FREE, "wudi", "iso_c", "tsv_m")
ORDER_MATTERS = ("nufilt", "null_space", "adapter_only", "opcm", "ties", "knots")
HOMOGENEOUS = (*ORDER_FREE, "null_space", "ties", "iso_c", "tsv_m", "opcm", "knots")
NOT_HOMOGENEOUS = ("nufilt", "adapter_only", "wudi")
ROTATES_LEFT = ("sum", "weight_average", "task_arithmetic", "null_space", "iso_c", "tsv_m", "opcm", "knots")
ROTATES_RIGHT = ROTATES_LEFT[:-1]
ROTATES_NOT = ("ties", "magmax", "wudi")
PER_LAYER = [name for name, rule in methods.RULES.items() if not (rule.whole_model or rule.survey)]
SETTINGS = [
    *((name, {}) for name in PER_LAYER),
    *((name, {"variant": "text"}) for name in PER_LAYER if hasattr(methods.RULES[name].config, "variant")),
]
DATA_FREE = [name for name, rule in methods.RULES.items() if not rule.needs_data]


def test_the_lists_of_this_file_leave_no_rule_out():
    assert set(SWAP_FREE) | set(ORDER_MATTERS) == set(DATA_FREE)
    assert set(HOMOGENEOUS) | set(NOT_HOMOGENEOUS) == set(DATA_FREE)
    assert set(ROTATES_LEFT) | set(ROTATES_NOT) | {"nufilt", "adapter_only"} == set(DATA_FREE)


@pytest.mark.parametrize("name", methods.RULES)
def test_structure_and_dtypes_are_the_bases(name):
    base = change(BASE, lambda _, x: x.astype(ml_dtypes.bfloat16))
    state = merge(name, base=base)
    merged = {key: x for key, x in state.merged.items() if key not in state.added}
    assert {key: (x.shape, x.dtype) for key, x in merged.items()} == {k: (x.shape, x.dtype) for k, x in base.items()}


@pytest.mark.parametrize("name", methods.RULES)
def test_models_that_learned_nothing_leave_the_base(name):
    assert moved(merge(name, tasks=[BASE] * 3)) == set()


@pytest.mark.parametrize("name", methods.RULES)
def test_update_changes_nothing_that_it_was_given(name):
    rule = rule_for(name)
    first = update(name, rule, rule.init(BASE), TASKS[0])
    copies = jax.tree.map(np.array, (first, TASKS[1]))
    update(name, rule, first, TASKS[1])
    chex.assert_trees_all_equal((first, TASKS[1]), copies)


@pytest.mark.parametrize("name", methods.RULES)
def test_a_state_that_went_through_files_continues_alike(name):
    rule = rule_for(name, other_params="average")
    state = update(name, rule, update(name, rule, rule.init(BASE), TASKS[0]), TASKS[1])
    leaves, structure = jax.tree.flatten(state)
    restored = jax.tree.unflatten(structure, [np.array(x) for x in leaves])
    again, straight = (update(name, rule, each, TASKS[2]) for each in (restored, state))
    chex.assert_trees_all_equal(again.merged, straight.merged)


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_halves_of_the_layers_merge_apart_as_together(name, settings, monkeypatch):
    """To the bit, if stacks stay whole: programs of other sizes round otherwise."""
    config = CONFIGS.get(name) or methods.RULES[name].config()
    monkeypatch.setitem(CONFIGS, name, dataclasses.replace(config, **settings))
    whole = merge(name)
    for half in (whole.delta.names[::2], whole.delta.names[1::2]):
        layers = sum(half, ())
        part = merge(name, base={key: BASE[key] for key in layers}, selection=Selection(layers, ()))
        assert part.delta.names == half and part.extra.keys() == whole.extra.keys() & set(layers)
        for got, wanted in ((part.delta, whole.delta), (part.extra, whole.extra)):
            chex.assert_trees_all_equal(dict(got), {key: wanted[key] for key in got})


def test_the_rules_of_whole_models_are_known():
    assert set(methods.RULES) - set(PER_LAYER) == {"ties", "opcm", "adamerging", "wemoe"}


@pytest.mark.parametrize("name", ORDER_FREE)
def test_the_order_does_not_matter(name):
    chex.assert_trees_all_close(merge(name).merged, merge(name, TASKS[::-1]).merged, atol=2e-6)


@pytest.mark.parametrize("name", SWAP_FREE)
def test_two_tasks_can_be_swapped(name):
    one, other = merge(name, TASKS[:2]).merged, merge(name, TASKS[1::-1]).merged
    chex.assert_trees_all_close(one, other, atol=5e-6)


@pytest.mark.parametrize("name", ORDER_MATTERS)
def test_the_order_matters(name):
    one, other = merge(name, TASKS[:2]).merged, merge(name, TASKS[1::-1]).merged
    assert not np.allclose(one[Q.format(0)], other[Q.format(0)], rtol=0, atol=2e-5)


def scaled(name, factor):
    """D of scaled task vectors, and scaled D; from a base of zeros: no rounding moves an entry over a threshold."""
    zeros = change(BASE, lambda _, x: np.zeros_like(x))
    vectors = [change(task, lambda key, x: x - BASE[key]) for task in TASKS]
    large = [change(vector, lambda _, x: factor * x) for vector in vectors]
    return merge(name, large, zeros).delta, jax.tree.map(lambda x: factor * x, merge(name, vectors, zeros).delta)


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_scaling_all_task_vectors_scales_the_result(name, monkeypatch):
    monkeypatch.setitem(CONFIGS, "knots", KnotsConfig(cutoff=0))  # its cut is absolute
    chex.assert_trees_all_close(*scaled(name, np.float32(4)), atol=1e-4)


@pytest.mark.parametrize("name", NOT_HOMOGENEOUS)
def test_adams_steps_do_not_scale(name, monkeypatch):
    if name in CONFIGS:  # few and short steps leave little to see
        monkeypatch.setitem(CONFIGS, name, dataclasses.replace(CONFIGS[name], learning_rate=0.02))
    large, small = scaled(name, np.float32(4))
    assert not np.allclose(large[Q.format(0)], small[Q.format(0)], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", DATA_FREE)
def test_hidden_units_have_no_order(name):
    """A permutation of a feed-forward layer's units, the same in all models, permutes the result."""
    order = np.random.default_rng(0).permutation(INNER)

    def permute(key, x):
        if key in (FC1.format(0), BIAS.format(0)):
            return x[order]
        return x[:, order] if key == FC2.format(0) else x

    plain = change(merge(name).merged, permute)
    turned = merge(name, [change(task, permute) for task in TASKS], change(BASE, permute)).merged
    chex.assert_trees_all_close(turned, plain, atol=2e-5)


def rotated(name, side):
    """Results of rotating one layer in all models, and of rotating the result."""
    q = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)

    def rotate(key, x):
        if key != Q.format(1):
            return x
        return q @ x if side == "left" else x @ q

    after = rotate(Q.format(1), np.asarray(merge(name).merged[Q.format(1)]))
    before = merge(name, [change(task, rotate) for task in TASKS], change(BASE, rotate)).merged[Q.format(1)]
    return before, after


@pytest.mark.parametrize(
    ("name", "side"), [*((n, "left") for n in ROTATES_LEFT), *((n, "right") for n in ROTATES_RIGHT)]
)
def test_rotations_of_a_layer_commute(name, side):
    np.testing.assert_allclose(*rotated(name, side), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "side"), [*((n, s) for n in ROTATES_NOT for s in ("left", "right")), ("knots", "right")]
)
def test_rotations_of_a_layer_do_not_commute_with_signs_and_thresholds(name, side):
    assert not np.allclose(*rotated(name, side), atol=1e-3)


@pytest.mark.parametrize("name", methods.RULES)
@pytest.mark.parametrize(
    "tensor", [Q.format(1), FC1.format(0), FC2.format(0), POSITION, BIAS.format(1), CLASS, PATCH, NORM]
)
def test_touched_tensors(name, tensor):
    """Tasks that differ from the base in one tensor alone."""
    tasks = [BASE | {tensor: task[tensor]} for task in TASKS]
    assert moved(merge(name, tasks)) == TOUCHED[name] & {tensor}


@pytest.mark.parametrize("name", methods.RULES)
def test_layers_narrow_every_rule(name):
    assert moved(merge(name, layers=r"q_proj\.weight")) == {Q.format(i) for i in range(BLOCKS)}


def as_flax(params):
    """The model as HF Flax holds it: kernels are transposed."""
    tree = {}
    for name, x in params.items():
        *path, leaf = name.split(".")
        if name == POSITION:
            leaf = "embedding"
        elif name == NORM:
            leaf = "scale"
        elif leaf == "weight":
            leaf, x = "kernel", x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = x
    return tree


@pytest.mark.parametrize("name", methods.RULES)
def test_models_from_flax_merge_alike(name):
    config = {"model_type": "clip_vision_model"}
    base, *tasks = ({**from_flax(as_flax(x), config)} for x in (BASE, *TASKS))
    chex.assert_trees_all_equal(merge(name, tasks, base).merged, merge(name).merged)


@pytest.mark.parametrize("name", ["nufilt", "wudi", "iso_c", "tsv_m", "opcm", "knots"])
def test_a_solution_that_is_not_finite_is_named(name):
    rule = rule_for(name)
    state = rule.update(rule.init(BASE), TASKS[0])
    broken = TASKS[1] | {Q.format(1): TASKS[1][Q.format(1)] + np.float32(np.nan)}
    with pytest.raises(SolveError) as error:
        rule.update(state, broken)
    assert [problem.tensor for problem in error.value.problems] == [Q.format(1)]
