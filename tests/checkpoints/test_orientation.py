"""Weights that lie in the file as `[d_in, d_out]`: of which models, and how that is known."""

import re

import model_builders as build
import numpy as np
import pytest

import nufilt_jax as nj
from nufilt_jax.checkpoints import open_checkpoint, open_task

WIDTH = 4
CONV1D = {
    "attn.c_attn": (WIDTH, 3 * WIDTH),
    "attn.c_proj": (WIDTH, WIDTH),
    "mlp.c_fc": (WIDTH, 2 * WIDTH),
    "mlp.c_fc2": (WIDTH, 2 * WIDTH),
    "mlp.c_proj": (2 * WIDTH, WIDTH),
}
NO_TYPE = {"model_type": None, "architectures": ["GPT2LMHeadModel"]}


def model(fused=None, turned=False):
    rng = np.random.default_rng(0)
    shapes = CONV1D | ({"attn.c_attn": fused} if fused else {})
    found = {
        f"transformer.h.{i}.{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for i in range(2)
        for name, shape in shapes.items()
    }
    if turned:
        found = {name: np.ascontiguousarray(x.T) for name, x in found.items()}
    return found | {"transformer.wte.weight": np.ones((6, WIDTH), np.float32)}


def written(folder, tensors, **config):
    return str(build.write(folder, tensors, **config))


@pytest.mark.parametrize(
    "config",
    [*({"model_type": name} for name in ("gpt2", "jais", "btlm", "own")), NO_TYPE],
    ids=lambda config: str(config["model_type"]),
)
def test_conv1d_is_known_by_its_type_or_shape(tmp_path, config):
    stored = model()
    found = open_checkpoint(written(tmp_path / "m", stored, **config), role="base").read()
    live = nj.canonical(stored, config)
    for name, x in stored.items():
        wanted = x.T if ".c_" in name else x
        np.testing.assert_array_equal(found[name], wanted)
        np.testing.assert_array_equal(live[name], wanted)


@pytest.mark.parametrize("model_type", ["gpt2", "own"])
@pytest.mark.parametrize("wrapped", [r"_orig_mod.\g<0>", r"\g<0>_orig_mod.", r"\g<0>_checkpoint_wrapped_module."])
def test_wrappers_of_modules_turn_nothing(tmp_path, model_type, wrapped):
    stored = {re.sub(r"h\.\d+\.(?:attn\.|mlp\.)?", wrapped, name): x for name, x in model().items()}
    found = open_checkpoint(written(tmp_path / "m", stored, model_type=model_type), role="base").read()
    live = nj.canonical(stored, {"model_type": model_type})
    for name, x in stored.items():
        wanted = x.T if ".c_" in name else x
        np.testing.assert_array_equal(found[name], wanted)
        np.testing.assert_array_equal(live[name], wanted)


@pytest.mark.parametrize("prefix", ["", "module.", "speech._orig_mod."])
def test_a_part_of_conv1d_is_known_behind_a_prefix(prefix):
    name = f"{prefix}speech_decoder_model.model.decoder.layers.0.mlp.c_fc.weight"
    stored = {name: np.ones((WIDTH, 2 * WIDTH), np.float32)}
    assert nj.canonical(stored, {"model_type": "clvp"})[name].shape == (2 * WIDTH, WIDTH)


@pytest.mark.parametrize("field", ["n_embd", "hidden_size"])
def test_queries_that_share_keys_need_the_width(tmp_path, field):
    stored = model(fused=(WIDTH, 2 * WIDTH))
    folder = written(tmp_path / "m", stored, model_type="own", **{field: WIDTH})
    assert open_checkpoint(folder, role="base").tensors["transformer.h.1.attn.c_proj.weight"].axes == (1, 0)


@pytest.mark.parametrize("model_type", ["gpt_bigcode", "own"])
@pytest.mark.parametrize("fused", [(WIDTH, 3 * WIDTH), (WIDTH, 2 * WIDTH)], ids=str)
def test_linear_layers_of_the_same_names_lie_as_they_are(tmp_path, model_type, fused):
    stored = model(fused, turned=True)
    found = open_checkpoint(written(tmp_path / "m", stored, model_type=model_type, n_embd=WIDTH), role="base").read()
    for name, x in stored.items():
        np.testing.assert_array_equal(found[name], x)


def test_a_task_that_holds_too_little_to_tell_lies_as_its_base(tmp_path):
    stored = model()
    base = open_checkpoint(written(tmp_path / "base", stored, model_type="own"), role="base")
    name = "transformer.h.0.attn.c_proj.weight"
    task = open_task(written(tmp_path / "task", {name: stored[name]}, model_type="own"), base)
    np.testing.assert_array_equal(task.read()[name], stored[name].T)
