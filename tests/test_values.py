"""What callers in Python give of the wrong kind is said in one line, and numbers of any library are taken."""

import dataclasses
import json
import re

import jax.numpy as jnp
import model_builders as build
import numpy as np
import pytest

import nufilt_jax as nj
from nufilt_jax.checkpoints.flax_trees import to_flax
from nufilt_jax.errors import CheckpointError, ConfigError
from nufilt_jax.models import canonical_shapes, clip_image_features, parse_vision_config

NAME = "model.layers.0.mlp.up_proj.weight"
BASE = {NAME: np.zeros((4, 4), np.float32)}
CLIP = {"model_type": "clip_vision_model"}


class ForeignType:
    def __str__(self):
        return "torch.float32"


class Tensor:
    """With what torch's has, as far as a look at it goes."""

    shape, dtype, ndim = (4, 4), ForeignType(), 2

    def numpy(self):
        return np.zeros((4, 4), np.float32)

    def transpose(self, one, other):
        return self


WRONG = (
    (Tensor(), rf"{__name__}.Tensor \(call .numpy\(\), or .float\(\).numpy\(\) of bfloat16\)"),
    ([[0.0] * 4] * 4, "list"),
    (0.5, "float"),
    (None, "NoneType"),
)


@pytest.mark.parametrize(("wrong", "told"), WRONG, ids=lambda x: type(x).__name__)
def test_weights_that_are_no_arrays_are_refused_by_name(tmp_path, wrong, told):
    build.write(tmp_path / "base", BASE, model_type="llama")
    bad, rule = {NAME: wrong}, nj.methods.get("sum")
    for where, call in (
        ("base", lambda: nj.merge(bad, [BASE], method="sum")),
        ("task 'task-1'", lambda: nj.merge(BASE, [bad], method="sum")),
        ("task 'task-1'", lambda: nj.merge(tmp_path / "base", [bad], tmp_path / "out", method="sum")),
        ("base", lambda: rule.init(bad)),
        ("task", lambda: rule.update(rule.init(BASE), bad)),
        ("params", lambda: nj.save(bad, tmp_path / "out", like=tmp_path / "base")),
        ("params", lambda: nj.canonical(bad)),
        ("params", lambda: nj.from_flax(bad, CLIP)),
        ("params", lambda: to_flax(bad, CLIP)),
    ):
        if wrong is None and where == "task":  # where that is a tensor that is missing
            continue
        with pytest.raises(CheckpointError, match=f"^{where}: {NAME}: must be an array of NumPy or JAX, got {told}$"):
            call()
    assert not (tmp_path / "out").exists()


def test_a_nested_tree_is_told_of_what_makes_it_flat_and_names_are_texts():
    told = "base: model: must be an array of NumPy or JAX, got dict (nufilt_jax.canonical makes nested parameters flat)"
    with pytest.raises(CheckpointError, match=f"^{re.escape(told)}$"):
        nj.merge({"model": {"layers": {}}}, [BASE], method="sum")
    with pytest.raises(CheckpointError, match=r"^base: 1 is no name: it must be a text$"):
        nj.merge(BASE | {1: BASE[NAME]}, [BASE], method="sum")


def test_arrays_of_numpy_and_jax_are_taken():
    kinds = [np.ones((4, 4)), np.ones((4, 4), np.float16), jnp.ones((4, 4), jnp.bfloat16)]
    merged = nj.merge(BASE, [{NAME: x} for x in kinds], method="sum")
    np.testing.assert_array_equal(merged[NAME], np.full((4, 4), 3, np.float32))


def test_settings_are_numbers_of_any_library_and_kept_as_pythons():
    config = nj.NufiltConfig(filter_rank=np.int64(4), steps=jnp.int32(3), learning_rate=np.float32(0.5), ridge=2)
    assert config == nj.NufiltConfig(filter_rank=4, steps=3, learning_rate=0.5, ridge=2)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["filter_rank"] == 4
    assert {type(getattr(config, name)) for name in ("filter_rank", "steps")} == {int}
    for settings, message in (
        ({"steps": np.float32(3)}, "steps must be a whole number, got np.float32(3.0)"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"steps": np.int64(-1)}, "steps must be at least 0, got -1"),
        ({"learning_rate": np.float32("nan")}, "learning_rate must be a finite number, got np.float32(nan)"),
        ({"learning_rate": "1e-3"}, "learning_rate must be a finite number, got '1e-3'"),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            nj.NufiltConfig(**settings)


def swapped(params):
    """The same numbers in the order of bytes that is not this machine's."""
    return {name: x.astype(x.dtype.newbyteorder("S")) for name, x in params.items()}


@pytest.mark.parametrize("types", [("f8", "f4"), ("f4", "f8"), ("f2", "f2")], ids=str)
def test_either_order_of_bytes_is_taken(types, tmp_path):
    """Alike to the bit: from Python in one call and step by step; what comes out is in the machine's own."""
    rng = np.random.default_rng(0)
    base = {NAME: rng.normal(size=(8, 8)).astype(types[0]), "norm.weight": np.ones(8, types[0])}
    task = {name: (x + 1e-3 * rng.normal(size=x.shape)).astype(types[1]) for name, x in base.items()}
    base["model.position_ids"] = task["model.position_ids"] = np.arange(4)
    ranks = {"filter_rank": 2, "adapter_rank": 2, "task_rank": 2}
    for method, settings in (("sum", {}), ("nufilt", ranks)):
        wanted = nj.merge(base, [task, task], method=method, other_params="average", **settings)
        found = nj.merge(swapped(base), [swapped(task), task], method=method, other_params="average", **settings)
        assert all(build.same_bits(found[name], x) for name, x in wanted.items())
    rule = nj.methods.get("sum", layers="up_proj", other_params="average")
    ours, theirs = (rule.update(rule.init(b), t).merged for b, t in ((base, task), (swapped(base), swapped(task))))
    assert all(build.same_bits(np.asarray(theirs[name]), np.asarray(x)) for name, x in ours.items())
    model = build.write(tmp_path / "model", base)
    nj.save(swapped(base), tmp_path / "saved", like=model)
    assert all(build.same_bits(x, base[name]) for name, x in nj.load(tmp_path / "saved").items())


def test_a_forward_pass_takes_either_order_of_bytes():
    config = CLIP | {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"image_size": 4, "patch_size": 2}
    params = {n: np.ones(s, np.float32) for n, s in canonical_shapes(parse_vision_config(config)).items()}
    images = jnp.ones((1, 3, 4, 4))
    found = clip_image_features(swapped(params), images, config)
    np.testing.assert_array_equal(found, clip_image_features(params, images, config))
