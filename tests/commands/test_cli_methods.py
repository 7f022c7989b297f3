"""Every method through the whole command: merge, resume, add, card and recipe; and what is refused."""

import json
import re

import jax.numpy as jnp
import model_builders as build
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nufilt_jax.checkpoints import load
from nufilt_jax.methods import RULES, every_tensor
from nufilt_jax.models import canonical_shapes, parse_t5_config, parse_vision_config, t5_logits, t5_shapes

DATA_FREE = [name for name, rule in RULES.items() if not rule.needs_data]
LEARNING = [name for name, rule in RULES.items() if rule.needs_data]


def arguments(models, method, *names):
    tasks = [part for name in names for part in ("--task", f"{name}={models / name}")]
    ranks = build.RANKS if method in ("nufilt", "adapter_only") else ()
    return ("--base", models / "base", *tasks, "--method", method, *ranks)


@pytest.mark.parametrize("method", DATA_FREE)
def test_three_tasks_and_one_added_are_four(method, shared_models, tmp_path, nufilt):
    whole = nufilt("merge", *arguments(shared_models, method, *build.TASKS), "--out", tmp_path / "whole", "--json")
    assert whole.code == 0, whole.err
    three = nufilt("merge", *arguments(shared_models, method, *build.TASKS[:3]), "--out", tmp_path / "added")
    assert three.code == 0, three.err
    added = nufilt("add", tmp_path / "added", "--task", f"delta={shared_models / 'delta'}", "--json")
    assert added.code == 0, added.err
    assert build.weight_bytes(tmp_path / "whole") == build.weight_bytes(tmp_path / "added")
    recipe = json.loads((tmp_path / "added" / "nufilt.json").read_text())
    assert recipe["method"] == method and recipe["config"] == whole.json["config"]
    assert f"method `{method}`" in (tmp_path / "added" / "README.md").read_text()
    assert not build.same_bits(
        build.weights(tmp_path / "whole")[build.Q0], build.weights(shared_models / "base")[build.Q0]
    )


@pytest.mark.parametrize("method", RULES)
def test_a_plan_is_told_as_text(method, tmp_path, nufilt):
    """Rules for all tensors have stacks of biases and norms, whose shape is one number; wemoe has such of biases."""
    write_clip(tmp_path)
    data = ("--data", tmp_path / "data") if method in LEARNING else ()
    result = nufilt("plan", *arguments(tmp_path, method, "alpha"), *data)
    assert result.code == 0, result.err
    shapes = re.findall(r"^ +\d+ of shape (\[[\d, ]+\])$", result.out, re.MULTILINE)
    has_biases = RULES[method].scope is every_tensor or method == "wemoe"  # which moves attention as a whole
    assert shapes and (f"[{build.WIDTH}]" in shapes) == has_biases


def test_help_lists_every_method_with_needs_cost_and_settings(nufilt):
    documents = {entry["name"]: entry for entry in nufilt("merge", "--method", "help", "--json").json["methods"]}
    assert documents.keys() == RULES.keys()
    for name, entry in documents.items():
        told = nufilt("merge", "--method", f"help={name}")
        assert (told.code, told.err, told.out.splitlines()[0]) == (0, "", name)
        text = " ".join(told.out.split())  # lines are wrapped
        assert all(entry[key] and entry[key] in text for key in ("update", "needs", "touches", "cost", "source"))
        for key, value in entry["settings"].items():
            assert f"{key}={str(value).lower() if isinstance(value, bool) else value}" in told.out
    assert documents["wemoe"]["needs"] == "unlabelled examples, extra parameters"
    assert documents["ties"]["settings"]["density"] == 0.2


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("ties", "top_k=20", "ties has no setting 'top_k' (its settings: scale, density, variant,"),
        ("ties", "density=-0.1", "density must be at least 0, got -0.1"),
        ("knots", "density=101", "density must be at most 100, got 101.0"),
        ("magmax", "variant=paper", "variant must be one of code, text, got 'paper'"),
        ("opcm", "alpha=1", "alpha must be below 1, got 1.0"),
        ("opcm", "mask_diagonal=perhaps", "mask_diagonal must be true or false, got 'perhaps'"),
        ("wudi", "learning_rate=0", "--learning-rate: must be above 0, got 0.0"),
        ("iso_c", "scale=inf", "scale must be a finite number, got inf"),
        ("tsv_m", "scale", "'scale' is not of the form KEY=VALUE"),
    ],
)
def test_bad_settings_are_refused(method, setting, message, shared_models, tmp_path, refused):
    argv = arguments(shared_models, method, "alpha")
    (line,) = refused("merge", *argv, "--out", tmp_path / "out", "--method-args", setting)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_settings_reach_the_method(shared_models, tmp_path, nufilt):
    argv = (*arguments(shared_models, "opcm", "alpha", "beta"), "--method-args", "mask_diagonal=true", "alpha=0.3")
    result = nufilt("merge", *argv, "--out", tmp_path / "masked", "--json")
    assert result.json["config"]["mask_diagonal"] is True and result.json["config"]["alpha"] == 0.3
    nufilt("merge", *arguments(shared_models, "opcm", "alpha", "beta"), "--out", tmp_path / "plain")
    assert build.weight_bytes(tmp_path / "masked") != build.weight_bytes(tmp_path / "plain")
    again = nufilt("merge", *arguments(shared_models, "opcm", "alpha", "beta"), "--out", tmp_path / "masked")
    assert again.code == 1 and "nufilt: --method-args: mask_diagonal is True in the merge in" in again.err
    given = ("--method", "opcm", "--method-args", "mask_diagonal=false", "--task", f"c={shared_models / 'gamma'}")
    added = nufilt("add", tmp_path / "masked", *given)
    assert added.code == 1 and "nufilt: --method-args: mask_diagonal is True in this merge, got False" in added.err


CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": build.WIDTH,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def write_clip(folder, without=""):
    """A whole vision tower, two models near it, and examples of the first one's task."""
    shapes = canonical_shapes(parse_vision_config(CLIP))
    rng = np.random.default_rng(0)
    base = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    base = {name: x for name, x in base.items() if not (without and re.search(without, name))}
    build.write(folder / "base", base, **CLIP)
    for seed, name in enumerate(("alpha", "beta"), 1):
        build.write(folder / name, build.fine_tuned(base, seed), **CLIP)
    images = {"pixel_values": rng.normal(size=(4, 3, 8, 8)), "prototypes": rng.normal(size=(2, build.WIDTH))}
    (folder / "data").mkdir()
    save_file({name: x.astype(np.float32) for name, x in images.items()}, folder / "data" / "alpha.safetensors")


@pytest.mark.parametrize("method", LEARNING)
def test_a_plan_refuses_a_model_whose_forward_pass_lacks_tensors(method, tmp_path, refused, nufilt):
    write_clip(tmp_path, without="layer_norm1.bias|post_layernorm")
    argv = (*arguments(tmp_path, method, "alpha"), "--data", tmp_path / "data")
    lines = refused("plan", *argv)
    block = "vision_model.encoder.layers.0.layer_norm1.bias"
    assert [line.split(": ")[1:3] for line in lines] == [
        [f"{tmp_path}/base", name]
        for name in (block, "vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias")
    ]
    what = "is missing, and the model's forward pass needs it (choose a data-free method)"
    assert all(line.endswith(what) for line in lines)
    assert refused("merge", *argv, "--out", tmp_path / "out") == lines
    # Without a step the forward pass is not run.
    result = nufilt("merge", *argv, "--out", tmp_path / "out", "--method-args", "steps=0")
    assert result.code == 0, result.err


def test_a_plan_refuses_what_the_forward_pass_does_not_know(tmp_path, refused):
    write_clip(tmp_path)
    save_file(build.weights(tmp_path / "base") | {"head": np.ones(2)}, tmp_path / "base" / "model.safetensors")
    argv = (*arguments(tmp_path, "wemoe", "alpha"), "--data", tmp_path / "data")
    (line,) = refused("plan", *argv)
    assert f"{tmp_path}/base/model.safetensors: head: no such tensor in the model that config.json describes" in line
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(CLIP | {"num_attention_heads": 3}))
    (line,) = refused("plan", *argv)
    assert line == f"nufilt: {config}: hidden_size 16 is no multiple of num_attention_heads 3"


@pytest.mark.parametrize("method", LEARNING)
def test_methods_that_learn_need_examples(method, tmp_path, refused):
    write_clip(tmp_path)
    argv = arguments(tmp_path, method, "alpha", "beta")
    (line,) = refused("merge", *argv, "--out", tmp_path / "out")
    assert line.startswith(f"nufilt: --data: is missing: {method} learns from examples of each task")
    (tmp_path / "data" / "alpha.safetensors").unlink()
    lines = refused("merge", *argv, "--out", tmp_path / "out", "--data", tmp_path / "data")
    assert [line.split(": ")[1] for line in lines] == [f"{tmp_path}/data/{n}.safetensors" for n in ("alpha", "beta")]
    assert "alpha.safetensors: is missing: the method learns from examples of alpha" in lines[0]
    save_file({"pixel_values": np.zeros((2, 3, 8), np.float32)}, tmp_path / "data" / "alpha.safetensors")
    lines = refused("merge", *argv, "--out", tmp_path / "out", "--data", tmp_path / "data")
    assert ["pixel_values: has shape [2, 3, 8]" in lines[0], "prototypes: is missing" in lines[1]] == [True, True]


@pytest.mark.parametrize("method", LEARNING)
def test_methods_that_learn_say_first_that_a_model_cannot_be_run(method, tmp_path, refused):
    layers = {f"model.layers.{i}.self_attn.q_proj.weight": np.ones((4, 4), np.float32) for i in range(2)}
    for name in ("base", "alpha"):
        build.write(tmp_path / name, layers, model_type="llama")
    for data in ((), ("--data", tmp_path)):
        (line,) = refused("plan", *arguments(tmp_path, method, "alpha"), *data)
        assert line == "nufilt: --method: 'llama' models have no forward pass here (choose a data-free method)"


def test_data_belong_to_the_methods_that_learn(shared_models, tmp_path, nufilt):
    result = nufilt("merge", *arguments(shared_models, "sum", "alpha"), "--out", tmp_path / "out", "--data", tmp_path)
    assert result.code == 0 and "--data: no effect: sum learns from no examples" in result.err


@pytest.mark.parametrize("method", LEARNING)
def test_methods_that_learn_merge_the_built_in_models(method, tmp_path, nufilt, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = nufilt("merge", "--model", "tiny", "--method", method, "--json", "--method-args", "steps=3")
    assert result.code == 0, result.err
    document = result.json
    assert all(len(step["losses"]) == 3 for step in document["steps"])
    assert all(len(step["examples"]["sha256"]) == 64 for step in document["steps"])
    rows = {row["name"]: row for row in document["evaluation"]["models"]}
    assert rows[method]["accuracy"] == document["steps"][-1]["accuracy"]
    folder = tmp_path / f"{method}-tiny"
    beside = folder / "added_parameters.safetensors"
    assert beside.exists() == RULES[method].adds_parameters
    if beside.exists():
        names = load_file(beside).keys()
        assert sum(name.endswith("gate.weight") for name in names) == 2
        assert "added_parameters.safetensors" in (folder / "README.md").read_text()


T5 = {
    "model_type": "t5",
    "vocab_size": 11,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


@pytest.fixture
def t5_models(tmp_path):
    """A T5, two models near it, and examples of their tasks."""
    shapes = t5_shapes(parse_t5_config(T5))
    rng = np.random.default_rng(0)
    base = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    build.write(tmp_path / "base", base, **T5)
    (tmp_path / "data").mkdir()
    for seed, name in enumerate(("alpha", "beta"), 1):
        build.write(tmp_path / name, build.fine_tuned(base, seed), **T5)
        texts = {"input_ids": rng.integers(2, 11, (20, 6)), "attention_mask": np.ones((20, 6), np.int64)}
        save_file(texts, tmp_path / "data" / f"{name}.safetensors")
    return tmp_path


@pytest.mark.parametrize("method", LEARNING)
def test_methods_that_learn_merge_t5(method, t5_models, nufilt):
    argv = (*arguments(t5_models, method, "alpha", "beta"), "--data", t5_models / "data")
    result = nufilt("merge", *argv, "--method-args", "steps=2", "batch_size=4", "--out", t5_models / "out", "--json")
    assert result.code == 0, result.err
    assert all(len(step["losses"]) == 2 for step in result.json["steps"])
    tokens, start = jnp.full((2, 6), 5), jnp.zeros((2, 1), jnp.int32)
    folders = (t5_models / name for name in ("out", "base"))
    merged, base = (t5_logits(load(str(folder)), tokens, jnp.ones_like(tokens), start, T5) for folder in folders)
    assert np.isfinite(merged).all() and not np.allclose(merged, base, atol=1e-3)


def test_texts_that_do_not_fit_are_refused(t5_models, refused):
    save_file({"input_ids": np.zeros((3, 6, 1), np.int64)}, t5_models / "data" / "beta.safetensors")
    argv = (*arguments(t5_models, "adamerging", "alpha", "beta"), "--data", t5_models / "data")
    lines = refused("merge", *argv, "--out", t5_models / "out")
    assert "input_ids: has shape [3, 6, 1], and should be [n, tokens]" in lines[0]
    assert "attention_mask: is missing, and should be [n, tokens]" in lines[1]


def test_a_t5_without_a_tensor_is_refused(t5_models, refused):
    norm = "decoder.final_layer_norm.weight"
    for name in ("base", "alpha"):
        tensors = build.weights(t5_models / name)
        del tensors[norm]
        save_file(tensors, t5_models / name / "model.safetensors")
    argv = (*arguments(t5_models, "adamerging", "alpha"), "--data", t5_models / "data")
    (line,) = refused("plan", *argv)
    assert f"base: {norm}: is missing, and the model's forward pass needs it" in line
