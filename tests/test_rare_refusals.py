"""Refusals that few will meet, each in the shortest way that leads to it."""

import dataclasses
import json
from types import SimpleNamespace

import adapter_builders as adapters
import model_builders as build
import numpy as np
import pytest
from ml_dtypes import float8_e4m3fn
from safetensors.numpy import save_file

from nufilt_jax.checkpoints import open_checkpoint, open_task
from nufilt_jax.checkpoints.outputs import plan_shards
from nufilt_jax.commands.arguments import Arguments
from nufilt_jax.commands.request import check_usage, continued_job
from nufilt_jax.engine import exports
from nufilt_jax.engine.examples import example_problems
from nufilt_jax.engine.extraction import extract_adapter
from nufilt_jax.errors import CheckpointError, NotYetError, OutputError, UsageError
from nufilt_jax.models.clip_config import parse_vision_config
from nufilt_jax.output import arrays
from nufilt_jax.output.documents import read_scores
from nufilt_jax.output.place import OutputPlace


@pytest.fixture(scope="module")
def base(shared_models):
    return open_checkpoint(str(shared_models / "base"), role="base")


def test_a_task_without_a_name():
    with pytest.raises(UsageError, match=r"task: 'a' is not of the form NAME=PATH_OR_HUB\[@REV\]"):
        check_usage(Arguments(base="b", task=("a",)))


def test_examples_that_do_not_fit(base, tmp_path):
    base = dataclasses.replace(base, config={**base.config, "num_attention_heads": 4})
    side = parse_vision_config(base.config).image_size
    tensors = {"pixel_values": np.zeros((2, 3, side, side + 1), np.float32)}
    tensors |= {"prototypes": np.zeros((4, 5), np.float32), "labels": np.zeros(3, np.int64)}
    save_file(tensors, tmp_path / "a.safetensors")
    images, heads, labels = example_problems({"a": tmp_path / "a.safetensors"}, base)
    assert f", but the model takes [n, 3, {side}, {side}]" in str(images)
    assert images.what == f"has shape [2, 3, {side}, {side + 1}], but the model takes [n, 3, {side}, {side}]"
    assert heads.what.startswith("has shape [4, 5], but the model's features have ")
    assert labels.what == "has shape [3], but there are 2 images"
    with pytest.raises(NotYetError, match="'llama' models have no forward pass here"):
        list(example_problems({}, SimpleNamespace(config={"model_type": "llama"})))


def test_a_layer_that_the_model_does_not_have(base, shared_models):
    recipe = SimpleNamespace(settings=SimpleNamespace(output="model"), base=None)
    with pytest.raises(CheckpointError, match="is in the state of the merge, and not in its model"):
        exports._shapes(recipe, shared_models / "base", ["nowhere.weight"], offline=True)


def test_an_element_type_that_no_state_has():
    with pytest.raises(arrays.DamagedError, match="w has the element type F4, which no state has"):
        arrays._dtype(SimpleNamespace(name="w", dtype="F4"))


def test_what_flax_files_cannot_hold(tmp_path):
    tensors = build.tower(0) | {"extra.weight": np.zeros((2, 2), float8_e4m3fn)}
    folder = build.write(tmp_path / "m", tensors)
    with pytest.raises(CheckpointError, match="holds F8_E4M3, which Flax files cannot"):
        plan_shards(open_checkpoint(str(folder), role="base"), "flax", None)


def test_an_adapter_needs_both_models_alike(shared_models, tmp_path):
    tensors = build.weights(shared_models / "alpha")
    tensors[build.Q0] = tensors[build.Q0][:-1]
    folder = build.write(tmp_path / "m", tensors)
    with pytest.raises(CheckpointError, match=r"has shape \[15, 16\], but \[16, 16\] in the base"):
        extract_adapter(str(folder), str(shared_models / "base"), tmp_path / "out", rank=1, watch=lambda _: None)


def test_a_head_that_is_tied_to_the_embeddings_is_not_adapted(tmp_path):
    embeddings = np.ones((12, 8), np.float32)
    tensors = {"model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings}
    config = {"model_type": "llama", "tie_word_embeddings": True}
    base = open_checkpoint(str(build.write(tmp_path / "base", tensors, **config)), role="base")
    pairs = adapters.factors(tensors, 1, modules=("lm_head",))
    folder = adapters.write(tmp_path / "a", pairs, target_modules=["lm_head"])
    with pytest.raises(CheckpointError, match=r"adapts .*, which the base .* ties to another tensor"):
        open_task(str(folder), base)


def test_places_and_methods_that_give_no_output(models, tmp_path, refused, command):
    [line] = refused(*command(models, models / "base" / "out", "--method", "sum"))
    assert "lies inside the base's folder, whose files are copied" in line
    lines = refused(*command(models, tmp_path / "out", "--method", "ties", "--output", "adapter"))
    assert "adapter: ties is not linear in the factors of its tasks, so that its result has full rank" in lines[0]


def test_recipes_of_other_versions(models, tmp_path, nufilt, command, monkeypatch):
    out = tmp_path / "out"
    assert nufilt(*command(models, out, "--method", "sum", n=1)).code == 0
    from nufilt_jax.commands import request

    found = request.recorded_in

    def old(place):
        recorded = found(place)
        return dataclasses.replace(recorded, recipe=dataclasses.replace(recorded.recipe, version=1))

    monkeypatch.setattr(request, "recorded_in", old)
    with pytest.raises(OutputError, match=r"is a merge of a development version of .*, whose state"):
        continued_job(Arguments(), OutputPlace(out))
    recipe = out / "nufilt.json"
    recipe.write_text(recipe.read_text().replace('"recipe_version": ', '"recipe_version": 9'))
    assert "the recipe nufilt.json is damaged or of another version: " in nufilt("verify", out).err


def test_scores_that_lack_one(tmp_path):
    rows = [{"name": "merged", "accuracy": {"a": 0.5}, "acc": 0.5, "bwt": None, "seconds": 1.0, "compile": 0.5}]
    document = {"tasks": ["a", "b"], "limit": None, "dtype": "float32", "models": rows}
    (tmp_path / "evaluation.json").write_text(json.dumps(document))
    with pytest.raises(OutputError, match="is damaged: 'merged' has no accuracy of 'b'"):
        read_scores(tmp_path / "evaluation.json")
