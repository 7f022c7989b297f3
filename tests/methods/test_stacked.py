import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from merging import BASE, TASKS, rule_for, update

from nufilt_jax import methods
from nufilt_jax.methods import stacked
from nufilt_jax.methods.stacked import Stacked, TaskVector, group_layers, stack_names, task_vector

SHAPES = {"b": (4, 3), "a": (4, 3), "wide": (2, 5), "bias": (4,), "scale": (), "tall": (6, 3)}
NAMES = stack_names(SHAPES, SHAPES)


def tensors(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items()}


def test_stacks_are_sorted_as_the_solver_groups_them():
    assert NAMES == (("scale",), ("a", "b"), ("tall",), ("bias",), ("wide",))
    matrices = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}
    groups = group_layers(matrices)
    assert stack_names(matrices, matrices) == tuple(names for group in groups for names in group.stacks)


def test_stacked_is_a_mapping_and_a_tree():
    values = tensors(0)
    whole = stacked.stacked(values, NAMES)
    assert set(whole) == set(values) and len(whole) == len(values)
    assert whole.shapes == SHAPES
    chex.assert_trees_all_equal(dict(whole), values)
    chex.assert_trees_all_equal(dict(jax.tree.map(lambda x: x + 1, whole)), {k: x + 1 for k, x in values.items()})
    part = whole.only((("a", "b"),)) + whole.only((("bias",),))
    assert list(part) == ["a", "b", "bias"]
    with pytest.raises(KeyError):
        whole.only((("a",),))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_task_vectors_of_host_and_device_arrays_are_equal(dtype):
    base, task = tensors(0, dtype), tensors(1, dtype)
    from_host = task_vector(base, task, NAMES)
    from_device = task_vector(jax.tree.map(jnp.asarray, base), jax.tree.map(jnp.asarray, task), NAMES)
    expected = {name: task[name].astype(np.float32) - base[name].astype(np.float32) for name in base}
    for found in (from_host, from_device):
        assert isinstance(found, TaskVector)
        assert {x.dtype for x in found.stacks} == {np.dtype(np.float32)}
        chex.assert_trees_all_equal(dict(found), expected)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the memory of CPU devices")
def test_host_stacks_become_device_arrays_without_a_copy():
    host = stacked._aligned((3, 5, 7))
    host[:] = 1
    assert jax.device_put(host).unsafe_buffer_pointer() == host.ctypes.data


LAYERS = [f"vision_model.encoder.layers.{i}.self_attn.q_proj.weight" for i in range(3)]


@pytest.mark.parametrize("name", methods.RULES)
def test_giving_up_the_state_changes_no_result(name):
    rule = rule_for(name)
    kept = given_up = rule.init(BASE)
    for task in TASKS:
        kept = update(name, rule, kept, task)
        before, vector = given_up.delta, task_vector(BASE, task, given_up.delta.names)
        given_up = update(name, rule, given_up, vector, donate=True)
        if name != "adamerging":  # which reads no D
            assert all(x.is_deleted() for x in before.stacks if isinstance(x, jax.Array))
    chex.assert_trees_all_equal(dict(given_up.delta), dict(kept.delta))
    assert isinstance(kept.delta, Stacked)
