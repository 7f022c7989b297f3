"""A merge from the command line: what the output folder holds, and that it is what the methods compute."""

import hashlib
import json
import os

import ml_dtypes
import model_builders as build
import numpy as np
import pytest

import nufilt_jax as nj
from nufilt_jax.methods.null_space import NullSpaceConfig

CONFIG = nj.NufiltConfig(filter_rank=4, adapter_rank=2, task_rank=2, steps=4)


def merged_by_hand(models, tasks, method="nufilt", config=CONFIG, **options):
    rule = nj.methods.get(method, config, **options)
    state = rule.init(nj.load(str(models / "base")))
    for name in tasks:
        state = rule.update(state, nj.load(str(models / name)))
    return {name: np.asarray(value) for name, value in state.merged.items()}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def merged(shared_models, tmp_path_factory, command):
    """One finished merge, for the tests that only look at it."""
    from nufilt_jax.cli import main

    out = tmp_path_factory.mktemp("merged") / "out"
    assert main(command(shared_models, out, "--quiet", "--seed", "3")) == 0
    return out


def test_output_folder(merged, shared_models):
    assert {path.name for path in merged.parent.iterdir()} - {"out.lock"} == {"out"}
    expected = {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"}
    assert {path.name for path in merged.iterdir()} == expected | {"nufilt.json", "forecast.json", "state"}
    for name in ("config.json", "preprocessor_config.json"):
        assert (merged / name).read_bytes() == (shared_models / "base" / name).read_bytes()


def test_recipe(merged, shared_models):
    def source(name):
        return os.path.relpath(shared_models / name, merged)

    recipe = json.loads((merged / "nufilt.json").read_text())
    assert recipe["base"]["source"] == source("base")
    assert recipe["base"]["sha256"] == {"model.safetensors": sha256(shared_models / "base" / "model.safetensors")}
    assert [task["name"] for task in recipe["tasks"]] == ["alpha", "beta", "gamma"]
    for task in recipe["tasks"]:
        assert task["source"] == source(task["name"])
        assert task["revision"] is None
        assert task["sha256"] == {"model.safetensors": sha256(shared_models / task["name"] / "model.safetensors")}
    assert (recipe["method"], recipe["seed"], recipe["layers"]) == ("nufilt", 3, None)
    assert recipe["config"] == {
        **{"filter_rank": 4, "adapter_rank": 2, "task_rank": 2, "steps": 4, "learning_rate": 1e-3},
        **{"decomposition": "auto", "first_task": "paper", "solver": "adam", "ridge": 1.0},
    }
    assert [step["task"] for step in recipe["steps"]] == ["alpha", "beta", "gamma"]
    assert [step["resumed"] for step in recipe["steps"]] == [False] * 3
    assert [len(step["losses"]) for step in recipe["steps"]] == [0, 5, 5]
    assert all(step["losses"][-1] < step["losses"][0] for step in recipe["steps"][1:])
    assert all(step["seconds"] >= 0 for step in recipe["steps"])
    assert {"nufilt_jax", "jax", "numpy", "python"} <= recipe["versions"].keys()
    assert recipe["device"].startswith("cpu")


def test_card_and_forecast(merged):
    card = (merged / "README.md").read_text()
    assert "the base's own card" not in card
    assert all(name in card for name in ("alpha", "beta", "gamma", "nufilt", "stay as the base has them"))
    forecast = json.loads((merged / "forecast.json").read_text())
    assert [step["task"] for step in forecast["steps"]] == ["alpha", "beta", "gamma"]
    layers = forecast["steps"][1]["layers"]
    assert set(layers) == set(build.SELECTED)
    assert all(0 < layer["captured_share"] < 1 and layer["certified"] is True for layer in layers.values())


def test_weights_are_what_the_method_computes(merged, shared_models):
    by_hand = merged_by_hand(shared_models, ("alpha", "beta", "gamma"), seed=3)
    written = nj.load(str(merged))
    assert written.keys() == by_hand.keys()
    for name, value in by_hand.items():
        np.testing.assert_allclose(written[name], value, rtol=0, atol=1e-6, err_msg=name)
    other_seed = merged_by_hand(shared_models, ("alpha", "beta", "gamma"), seed=4)
    assert any(not np.allclose(other_seed[n], by_hand[n], rtol=0, atol=1e-6) for n in build.SELECTED)


def test_unselected_tensors_keep_every_bit(merged, shared_models):
    base, written = build.weights(shared_models / "base"), build.weights(merged)
    assert base.keys() == written.keys()
    changed = {name for name in base if not build.same_bits(base[name], written[name])}
    assert changed == set(build.SELECTED)


@pytest.mark.parametrize(
    ("method", "config", "options"),
    [
        ("null_space", NullSpaceConfig(filter_rank=4), ("--filter-rank", "4")),
        ("sum", None, ()),
        ("weight_average", None, ()),
        ("task_arithmetic", nj.methods.find("task_arithmetic").config(scale=0.2), ("--method-args", "scale=0.2")),
    ],
)
def test_every_method(shared_models, tmp_path, nufilt, method, config, options):
    tasks = [part for name in ("alpha", "beta") for part in ("--task", f"{name}={shared_models / name}")]
    out = tmp_path / "out"
    result = nufilt(
        *("merge", "--base", shared_models / "base", *tasks, "--out", out, "--method", method, *options, "--quiet")
    )
    assert (result.code, result.err) == (0, "")
    by_hand = merged_by_hand(shared_models, ("alpha", "beta"), method, config)
    written = build.weights(out)
    for name, value in by_hand.items():
        np.testing.assert_allclose(written[name], value, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("other", ["first", "average"])
def test_other_params(shared_models, tmp_path, nufilt, command, other):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, "--other-params", other, n=2)).code == 0
    models = [build.weights(shared_models / name) for name in ("alpha", "beta")]
    expected = models[0][build.FC2] if other == "first" else (models[0][build.FC2] + models[1][build.FC2]) / 2
    np.testing.assert_allclose(build.weights(out)[build.FC2], expected, rtol=0, atol=1e-6)


def test_layers(shared_models, tmp_path, nufilt, command):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, "--layers", r"mlp\.fc2", "--method", "sum", n=2)).code == 0
    base, written = build.weights(shared_models / "base"), build.weights(out)
    changed = {name for name in base if not build.same_bits(base[name], written[name])}
    assert changed == {name for name in base if name.endswith("mlp.fc2.weight")}


def tasks_beside(folder, base):
    for seed, name in enumerate(build.TASKS[:2], 1):
        build.write(folder / name, build.fine_tuned(base, seed))
    return folder


def test_bfloat16_base(tmp_path, nufilt, command):
    base = build.as_bfloat16(build.tower(0))
    build.write(tmp_path / "base", base, torch_dtype="bfloat16")
    models = tasks_beside(tmp_path, base)
    out = tmp_path / "out"
    assert nufilt(*command(models, out, n=2)).code == 0
    written = build.weights(out)
    assert {x.dtype for x in written.values()} == {np.dtype(ml_dtypes.bfloat16)}
    by_hand = merged_by_hand(models, ("alpha", "beta"))
    for name in build.SELECTED:  # rounded once, from float32
        np.testing.assert_allclose(written[name].astype(np.float32), by_hand[name].astype(np.float32), atol=2e-2)
    assert build.same_bits(written[build.FC2], base[build.FC2])


def test_rounding_to_bfloat16_never_feeds_the_next_step(tmp_path, nufilt, command):
    base = build.as_bfloat16(build.tower(0))
    models = tasks_beside(tmp_path, base)
    build.write(models / "base", base)
    build.write(models / "gamma", build.fine_tuned(base, 3))
    assert nufilt(*command(models, tmp_path / "all")).code == 0
    assert nufilt(*command(models, tmp_path / "grown", n=2)).code == 0
    assert nufilt("add", tmp_path / "grown", "--task", f"gamma={models / 'gamma'}").code == 0
    assert build.weight_bytes(tmp_path / "all") == build.weight_bytes(tmp_path / "grown")


def test_sharded_base(tmp_path, nufilt, command):
    base = build.tower(0)
    build.write(tmp_path / "base", base, shards=3)
    out = tmp_path / "out"
    assert nufilt(*command(tasks_beside(tmp_path, base), out, n=2)).code == 0
    index = "model.safetensors.index.json"
    shards = {path.name for path in (tmp_path / "base").glob("*.safetensors")}
    assert {path.name for path in out.glob("*.safetensors")} == shards
    assert len(json.loads((out / "nufilt.json").read_text())["base"]["sha256"]) == 3
    assert json.loads((out / index).read_text()) == json.loads((tmp_path / "base" / index).read_text())
    assert not build.same_bits(build.weights(out)[build.Q0], base[build.Q0])


def test_flax_base_and_flax_task(tmp_path, nufilt, command):
    base = build.tower(0)
    models = tasks_beside(tmp_path / "torch", base)
    build.write(models / "base", base)
    build.write_flax(tmp_path / "flax" / "base", base)
    for name in ("alpha", "beta"):
        build.write_flax(tmp_path / "flax" / name, build.weights(models / name))
    assert nufilt(*command(models, tmp_path / "a", n=2)).code == 0
    assert nufilt(*command(tmp_path / "flax", tmp_path / "b", n=2)).code == 0
    assert (tmp_path / "b" / "flax_model.msgpack").is_file()
    assert not (tmp_path / "b" / "model.safetensors").exists()
    ours, theirs = nj.load(str(tmp_path / "a")), nj.load(str(tmp_path / "b"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_format_and_dtype(shared_models, tmp_path, nufilt, command):
    assert nufilt(*command(shared_models, tmp_path / "plain", n=2)).code == 0
    assert nufilt(*command(shared_models, tmp_path / "flax", "--format", "flax", n=2)).code == 0
    assert nufilt(*command(shared_models, tmp_path / "half", "--dtype", "bfloat16", n=2)).code == 0
    plain, flax = nj.load(str(tmp_path / "plain")), nj.load(str(tmp_path / "flax"))
    assert [p.name for p in (tmp_path / "flax").iterdir() if "model" in p.name] == ["flax_model.msgpack"]
    assert plain.keys() == flax.keys()
    assert all(np.array_equal(plain[name], flax[name]) for name in plain)
    half = build.weights(tmp_path / "half")
    assert all(build.same_bits(half[name], plain[name].astype(ml_dtypes.bfloat16)) for name in plain)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_whole_clip_model_with_vision_only_tasks(tmp_path, nufilt, command):
    vision, text = build.tower(0), build.text_side()
    build.write(tmp_path / "base", vision | text, model_type="clip")
    tasks_beside(tmp_path, vision)
    assert nufilt(*command(tmp_path, tmp_path / "out", "--other-params", "average", n=2)).code == 0
    written = build.weights(tmp_path / "out")
    assert written.keys() == vision.keys() | text.keys()
    assert all(build.same_bits(written[name], x) for name, x in text.items())
    assert not any(build.same_bits(written[name], x) for name, x in vision.items())
