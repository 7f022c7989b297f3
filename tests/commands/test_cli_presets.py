"""The presets: the paper's models, tasks and orders, and a merge of Hub ids from the local cache alone."""

import json
import random
import shutil
from pathlib import Path

import model_builders as build
import numpy as np
import pytest

from nufilt_jax.presets import CLIP_BASES, GLUE_TASKS, TASKS, clip_preset, flan_t5_preset, shuffled

SCALED = ("task_arithmetic", "ties", "knots")
PAPER = json.loads((Path(__file__).parents[1] / "data" / "table6_orders.json").read_text())
COMMITS = {"main": "0123456789abcdef0123456789abcdef01234567", "v2": "89abcdef0123456789abcdef0123456789abcdef"}


def squeezed(name):
    return name.lower().replace("-", "").replace("_", "").replace("letters", "")


def test_models():
    assert CLIP_BASES == {
        "vit-b32": "openai/clip-vit-base-patch32",
        "vit-b16": "openai/clip-vit-base-patch16",
        "vit-l14": "openai/clip-vit-large-patch14",
    }


def test_tasks_stand_in_the_order_of_the_papers_ids():
    aliases = {"cars": "stanfordcars", "flowers102": "oxfordflowers102"}
    theirs = [squeezed(PAPER["tasks"][str(number)]) for number in range(1, 21)]
    assert [squeezed(name) for name in TASKS] == [aliases.get(name, name) for name in theirs]


@pytest.mark.parametrize("group", [8, 14, 20])
def test_all_orders_of_the_paper(group):
    orders = PAPER["orders"][str(group)]
    assert len(orders) == 10
    for number, order in enumerate(orders, 1):
        preset = clip_preset("vit-b16", group, number)
        assert [name for name, _ in preset.tasks] == [TASKS[task - 1] for task in order]
        assert all(source == f"tanganke/clip-vit-base-patch16_{name}" for name, source in preset.tasks)
        assert preset.base == "openai/clip-vit-base-patch16"
        assert preset.settings == ({} if group == 8 else {name: {"scale": 0.1} for name in SCALED})
    assert [name for name, _ in clip_preset("vit-b16", group, 0).tasks] == list(TASKS[:group])


def test_defaults_of_a_preset():
    assert clip_preset("vit-l14", None, None) == clip_preset("vit-l14", 8, 1)


def test_order_0_is_as_given():
    assert shuffled("abc", 0) == ("a", "b", "c")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub library's cache, in a folder of the test's own; gives a function that puts a model into it."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def put(name, source, revision="main"):
        root = cache / f"models--{name.replace('/', '--')}"
        snapshot = root / "snapshots" / COMMITS[revision]
        for folder in (root / "refs", root / "blobs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        (root / "refs" / revision).write_text(COMMITS[revision])
        for path in source.iterdir():
            blob = f"{revision}-{path.name}"
            shutil.copy(path, root / "blobs" / blob)
            (snapshot / path.name).symlink_to(f"../../blobs/{blob}")

    return put


@pytest.fixture
def cached_preset(hub, shared_models):
    hub("openai/clip-vit-base-patch32", shared_models / "base")
    for number, name in enumerate(TASKS):
        hub(f"tanganke/clip-vit-base-patch32_{name}", shared_models / build.TASKS[number % 4])


def test_preset_is_planned_from_the_cache(cached_preset, nufilt):
    result = nufilt("plan", "--model", "vit-b32", "--group", "14", "--order", "3", "--offline", "--json")
    assert result.code == 0, result.err
    names = [TASKS[task - 1] for task in PAPER["orders"]["14"][2]]
    assert [task["name"] for task in result.json["tasks"]] == names
    assert result.json["tasks"][0]["source"] == f"tanganke/clip-vit-base-patch32_{names[0]}"
    assert result.json["out"].endswith("nufilt-vit-b32-14-order3")


def test_preset_order_given(cached_preset, nufilt):
    result = nufilt("plan", "--model", "vit-b32", "--order", "given", "--offline", "--json", "--method", "sum")
    assert [task["name"] for task in result.json["tasks"]] == list(TASKS[:8])
    assert result.json["out"].endswith("sum-vit-b32-8-given")


@pytest.mark.parametrize("method", SCALED)
@pytest.mark.parametrize(("group", "scale"), [("8", 0.3), ("20", 0.1)])
def test_preset_takes_the_papers_scale(cached_preset, nufilt, group, scale, method):
    argv = ("plan", "--model", "vit-b32", "--group", group, "--method", method, "--offline", "--json")
    assert nufilt(*argv).json["config"]["scale"] == scale
    assert nufilt(*argv, "--method-args", "scale=0.5").json["config"]["scale"] == 0.5


def t5(seed, base=None):
    """A T5 of one block a side with a head of its own, embedding stored under one name."""
    rng = np.random.default_rng(seed)
    shapes = {"shared.weight": (12, 8), "lm_head.weight": (12, 8), "encoder.final_layer_norm.weight": (8,)}
    attention = {f"SelfAttention.{part}.weight": (8, 8) for part in "qkvo"}
    dense = {"DenseReluDense.wi_0.weight": (16, 8), "DenseReluDense.wi_1.weight": (16, 8)}
    dense |= {"DenseReluDense.wo.weight": (8, 16)}
    for side, n_layers in (("encoder", 2), ("decoder", 3)):
        stem = f"{side}.block.0.layer."
        shapes |= {f"{stem}0.{name}": shape for name, shape in attention.items()}
        shapes |= {f"{stem}0.SelfAttention.relative_attention_bias.weight": (4, 2)}
        shapes |= {f"{stem}{n_layers - 1}.{name}": shape for name, shape in dense.items()}
    near = {name: 0.0 if base is None else base[name] for name in shapes}
    scale = 1.0 if base is None else 0.05
    return {k: np.asarray(near[k] + scale * rng.standard_normal(s), np.float32) for k, s in shapes.items()}


T5_CONFIG = {"model_type": "t5", "tie_word_embeddings": False}


@pytest.fixture
def cached_t5(hub, tmp_path):
    """The models of the Flan-T5 preset in the cache, small; gives their parameters by source."""
    base = t5(0)
    models = {"google/flan-t5-base": base}
    models |= {source: t5(seed, base) for seed, (_, source) in enumerate(flan_t5_preset(None, None).tasks, 1)}
    for number, (source, params) in enumerate(models.items()):
        hub(source, build.write(tmp_path / f"model{number}", params, **T5_CONFIG))
    return models


def test_flan_t5_merges_the_selected_layers_in_the_papers_order(cached_t5, tmp_path, nufilt):
    ranks = build.RANKS
    result = nufilt("merge", "--model", "flan-t5-base", "--offline", "--out", tmp_path / "out", "--json", *ranks)
    assert result.code == 0, result.err
    assert [task["name"] for task in result.json["tasks"]] == list(GLUE_TASKS)
    assert result.json["tasks"][0]["source"] == "tanganke/flan-t5-base_glue-cola"
    merged, base = build.weights(tmp_path / "out"), cached_t5["google/flan-t5-base"]
    moved = {name for name in base if not np.array_equal(merged[name], base[name])}
    assert merged.keys() == base.keys()
    assert moved == {name for name in base if ".layer." in name and "relative" not in name}


def test_flan_t5_is_planned_under_a_name_that_says_how(cached_t5, nufilt):
    argv = ("plan", "--model", "flan-t5-base", "--offline", "--json")
    assert nufilt(*argv).json["out"].endswith("nufilt-flan-t5-base")
    assert (
        nufilt(*argv, "--order", "2", "--preset-table", "2").json["out"].endswith("nufilt-flan-t5-base-table2-order2")
    )


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "opcm"])
def test_table_2_has_settings_of_its_own(cached_t5, tmp_path, nufilt, method):
    argv = ("merge", "--model", "flan-t5-base", "--offline", "--method", method)
    usual, table = tmp_path / "usual", tmp_path / "table"
    assert nufilt(*argv, "--out", usual).code == nufilt(*argv, "--preset-table", "2", "--out", table).code == 0
    assert build.weight_bytes(usual) != build.weight_bytes(table)
    base, last = cached_t5["google/flan-t5-base"], cached_t5["tanganke/flan-t5-base_glue-stsb"]
    if method == "task_arithmetic":  # Table 2's row is the base plus 0.3 of the last task
        for name, x in build.weights(table).items():
            np.testing.assert_allclose(x, base[name] + 0.3 * (last[name] - base[name]), atol=1e-6)


def test_an_embedding_stored_three_times_stays_one(tmp_path, nufilt):
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    base, task = t5(0), t5(1, t5(0))
    folder = build.write(tmp_path / "base", base | {name: base["shared.weight"] for name in names}, **T5_CONFIG)
    build.write(tmp_path / "task", task, **T5_CONFIG)
    argv = ("--base", folder, "--task", f"one={tmp_path / 'task'}", "--out", tmp_path / "out")
    assert nufilt("merge", *argv, "--method", "task_arithmetic").code == 0
    merged = build.weights(tmp_path / "out")
    wanted = base["shared.weight"] + np.float32(0.3) * (task["shared.weight"] - base["shared.weight"])
    for name in names:
        np.testing.assert_allclose(merged[name], wanted, atol=1e-6)
    assert not np.allclose(merged["lm_head.weight"], merged["shared.weight"])


def test_explicit_tasks_are_shuffled_as_the_paper_does(shared_models, nufilt, command):
    expected = list(build.TASKS)
    random.Random(41 + 12).shuffle(expected)
    argv = command(shared_models, "out", "--plan", "--json", n=4)
    assert [task["name"] for task in nufilt(*argv, "--order", "12").json["tasks"]] == expected != list(build.TASKS)
    for options in ((), ("--order", "given")):
        assert [task["name"] for task in nufilt(*argv, *options).json["tasks"]] == list(build.TASKS)


def test_merge_from_the_cache_records_revisions(hub, shared_models, tmp_path, nufilt, monkeypatch):
    hub("org/base", shared_models / "base")
    hub("org/alpha", shared_models / "alpha")
    hub("org/beta", shared_models / "alpha")
    hub("org/beta", shared_models / "beta", "v2")
    out = tmp_path / "out"
    tasks = ("--task", "alpha=org/alpha", "--task", "beta=org/beta@v2")
    result = nufilt("merge", "--base", "org/base", *tasks, "--out", out, "--offline", "--method", "sum", "--json")
    assert result.code == 0, result.err
    recorded = [(entry["source"], entry["revision"]) for entry in [result.json["base"], *result.json["tasks"]]]
    assert recorded == [("org/base", COMMITS["main"]), ("org/alpha", COMMITS["main"]), ("org/beta", COMMITS["v2"])]
    local = [part for name in ("alpha", "beta") for part in ("--task", f"{name}={shared_models / name}")]
    argv = ("--base", shared_models / "base", *local, "--method", "sum")
    assert nufilt("merge", *argv, "--out", tmp_path / "local").code == 0
    assert build.weight_bytes(out) == build.weight_bytes(tmp_path / "local")
    card = (out / "README.md").read_text()
    assert "base_model:\n- org/base\n- org/alpha\n- org/beta\n" in card and COMMITS["v2"] in card
    again = nufilt("add", out, "--task", f"gamma={shared_models / 'gamma'}", "--offline", "--json")
    assert (again.code, again.json["base"]["revision"]) == (0, COMMITS["main"])


def test_not_in_the_cache(hub, shared_models, tmp_path, nufilt):
    hub("org/alpha", shared_models / "alpha")
    tasks = ("--task", "alpha=org/alpha@v2", "--task", "beta=org/nothing")
    argv = ("merge", "--base", shared_models / "base", *tasks, "--out", tmp_path / "out", "--offline")
    result = nufilt(*argv)
    assert (result.code, len(result.lines)) == (1, 2)
    assert result.lines[0].startswith("nufilt: org/alpha: ") and "'v2'" in result.lines[0]
    assert result.lines[1].startswith("nufilt: org/nothing: ") and "--offline" in result.lines[1]
    assert not (tmp_path / "out").exists()


BLOCKS = 2
PROJECTIONS = {f"self_attn.{part}_proj": (8, 8) for part in "qkvo"}
PROJECTIONS |= {"mlp.gate_proj": (20, 8), "mlp.up_proj": (20, 8), "mlp.down_proj": (8, 20)}


def llava(seed, spelling, base=None):
    """A LLaVA of two blocks, as transformers 4 or 5 spells it."""
    language, head = {
        4: ("language_model.model.", "language_model."),
        5: ("model.language_model.", ""),
    }[spelling]
    outer = "" if spelling == 4 else "model."
    shapes = {
        f"{language}layers.{i}.{name}.weight": shape for i in range(BLOCKS) for name, shape in PROJECTIONS.items()
    }
    shapes |= {f"{language}embed_tokens.weight": (12, 8), f"{head}lm_head.weight": (12, 8)}
    shapes |= {f"{outer}multi_modal_projector.linear_1.weight": (8, 8)}
    shapes |= {f"{outer}vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8)}
    rng = np.random.default_rng(seed)
    near = np.zeros(len(shapes)) if base is None else list(base.values())  # in the same order
    drawn = (0.1 * rng.standard_normal(shape) for shape in shapes.values())
    return {k: np.asarray(x + d, np.float32) for k, x, d in zip(shapes, near, drawn, strict=True)}


@pytest.mark.parametrize(("spelling", "others"), [(4, 5), (5, 4)])
def test_llava_merges_its_language_model_in_either_spelling(hub, tmp_path, nufilt, spelling, others):
    base = build.as_bfloat16(llava(0, spelling))
    hub("llava-hf/llava-1.5-7b-hf", build.write(tmp_path / "base", base, shards=3, model_type="llava"))
    for seed, name in enumerate(("iconqa", "vizwiz"), 1):
        task = build.as_bfloat16(llava(seed, others, base))
        build.write(tmp_path / name, task, shards=2, model_type="llava")
    tasks = [part for name in ("iconqa", "vizwiz") for part in ("--task", f"{name}={tmp_path / name}")]
    argv = ("--model", "llava-1.5-7b", *tasks, "--offline", "--out", tmp_path / "out", *build.RANKS, "--json")
    result = nufilt("merge", *argv)
    assert result.code == 0, result.err
    merged = build.weights(tmp_path / "out")
    assert merged.keys() == base.keys()
    assert {x.dtype.name for x in merged.values()} == {"bfloat16"}
    moved = {name for name in base if not build.same_bits(merged[name], base[name])}
    assert moved == {name for name in base if "language_model" in name and ".layers." in name}
    assert len(moved) == BLOCKS * len(PROJECTIONS)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3


def test_llava_needs_tasks(refused):
    (line,) = refused("merge", "--model", "llava-1.5-7b", code=2)
    assert line.startswith("nufilt: --task: missing (llava-1.5-7b brings its base alone")
