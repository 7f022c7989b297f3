"""transformers' Flax classes (4.57 has the last ones) and this package read each other's models."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from flax.serialization import msgpack_restore, msgpack_serialize
from flax.traverse_util import flatten_dict, unflatten_dict
from interop_helpers import PROJECTION, TEXT, VISION, assert_close, images, merged, our_features, perturbed
from transformers import CLIPConfig, CLIPVisionConfig, FlaxCLIPModel, FlaxCLIPVisionModel

import nufilt_jax as nj
from nufilt_jax.checkpoints import to_flax

pytestmark = pytest.mark.parametrize("kind", ["vision", "whole"])


def make(kind):
    """A model whose every parameter, biases and norms too, is drawn."""
    if kind == "vision":
        model = FlaxCLIPVisionModel(CLIPVisionConfig(**VISION), seed=0)
    else:
        config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=PROJECTION)
        model = FlaxCLIPModel(config, seed=0)
    return changed(model, seed=0)


def changed(model, seed):
    rng = np.random.default_rng(seed)
    model.params = jax.tree.map(lambda value: jnp.asarray(perturbed(rng, np.asarray(value))), model.params)
    return model


def features(model, pixels):
    if isinstance(model, FlaxCLIPVisionModel):
        return model(pixel_values=pixels).pooler_output
    return model.get_image_features(pixel_values=pixels)


@pytest.fixture
def base(kind, tmp_path):
    make(kind).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def tasks(kind, tmp_path):
    """Models fine-tuned from the base."""
    folders = [tmp_path / f"task{seed}" for seed in (1, 2, 3)]
    for seed, folder in enumerate(folders, start=1):
        changed(make(kind), seed).save_pretrained(folder)
    return folders


def reopened(kind, folder, caplog):
    """The folder in their class, and what that said of tensors that were missing, left over or of another shape."""
    transformers.logging.enable_propagation()
    caplog.clear()
    model = type(make(kind)).from_pretrained(folder)
    transformers.logging.disable_propagation()
    notes = [record.getMessage() for record in caplog.records if "weights" in record.getMessage()]
    return model, notes


def assert_opens(kind, folder, caplog):
    """Their class takes every tensor and computes our features; returns them."""
    model, notes = reopened(kind, folder, caplog)
    assert notes == []
    found = features(model, images())
    assert_close(our_features(folder, images()), found)
    return found


def test_reopening_notices_what_does_not_fit(kind, base, caplog):
    file = base / "flax_model.msgpack"
    flat = flatten_dict(msgpack_restore(file.read_bytes()), sep="/")
    del flat["vision_model/post_layernorm/scale"]
    file.write_bytes(msgpack_serialize(unflatten_dict(flat | {"more": np.ones(2)}, sep="/")))
    _, notes = reopened(kind, base, caplog)
    assert any("not used" in note and "more" in note for note in notes)
    assert any("newly initialized" in note and "post_layernorm" in note for note in notes)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["single", "sharded"])
def test_their_folders_and_live_parameters_are_read(kind, tmp_path, shards):
    model = make(kind)
    model.save_pretrained(tmp_path / "m", **shards)
    assert (tmp_path / "m" / "flax_model.msgpack").exists() is not bool(shards)
    read, live = nj.load(str(tmp_path / "m")), nj.from_flax(model.params, model.config)
    assert len(read) == len(jax.tree.leaves(model.params))
    assert read.keys() == live.keys()
    for name, value in read.items():
        np.testing.assert_array_equal(value, live[name])
    assert_close(our_features(tmp_path / "m", images()), features(model, images()))


def test_live_parameters_come_back(kind):
    model = make(kind)
    back = to_flax(nj.from_flax(model.params, model.config), model.config)
    assert jax.tree.structure(back) == jax.tree.structure(model.params)
    jax.tree.map(np.testing.assert_array_equal, back, model.params)


def test_half_precision_is_kept(kind, tmp_path):
    model = make(kind)
    model.params = model.to_bf16(model.params)
    model.save_pretrained(tmp_path / "m")
    read = nj.load(str(tmp_path / "m"))
    assert {value.dtype for value in read.values()} == {np.dtype(ml_dtypes.bfloat16)}
    nj.save(read, tmp_path / "out", like=str(tmp_path / "m"))
    again = type(model).from_pretrained(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["single", "sharded"])
def test_a_merged_model_opens_in_their_class(kind, tmp_path, tasks, shards, caplog):
    make(kind).save_pretrained(tmp_path / "base", **shards)
    before = features(make(kind), images())
    nj.save(merged(tmp_path / "base", tasks), tmp_path / "out", like=str(tmp_path / "base"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "base").iterdir()}
    after = assert_opens(kind, tmp_path / "out", caplog)
    assert np.abs(after - before).max() > 0.1


def test_a_merged_safetensors_model_opens_in_their_class_as_flax(kind, tmp_path, base, tasks, caplog):
    torch_like = tmp_path / "torch-like"
    nj.save({}, torch_like, like=str(base), format="safetensors")
    params = merged(torch_like, tasks)
    nj.save(params, tmp_path / "out", like=str(torch_like), format="flax")
    assert (tmp_path / "out" / "flax_model.msgpack").exists()
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert_opens(kind, tmp_path / "out", caplog)
    model, _ = reopened(kind, tmp_path / "out", caplog)
    for name, value in nj.from_flax(model.params, model.config).items():
        np.testing.assert_array_equal(value, params[name])
