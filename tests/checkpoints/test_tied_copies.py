"""Tied tensors of models of all names: one parameter, however many copies of it a folder holds."""

import model_builders as build
import numpy as np
import pytest

from nufilt_jax.checkpoints import open_checkpoint

ROWS, WIDTH = 6, 4
# A layer, and the names of one table; the first is the one that the library saves.
FAMILIES = {
    "gpt2": ("transformer.h.0.mlp.c_fc", "transformer.wte", "lm_head"),
    "opt": ("model.decoder.layers.0.fc1", "model.decoder.embed_tokens", "lm_head"),
    "falcon": ("transformer.h.0.mlp.dense_h_to_4h", "transformer.word_embeddings", "lm_head"),
    "bert": ("bert.encoder.layer.0.output.dense", "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "whisper": ("model.encoder.layers.0.fc1", "model.decoder.embed_tokens", "proj_out"),
    "qwen2_5_vl": ("model.language_model.layers.0.mlp.up_proj", "model.language_model.embed_tokens", "lm_head"),
    "bart": (
        "model.encoder.layers.0.fc1",
        "model.shared",
        "model.encoder.embed_tokens",
        "model.decoder.embed_tokens",
        "lm_head",
    ),
    "led": ("led.encoder.layers.0.fc1", "led.shared", "led.encoder.embed_tokens", "led.decoder.embed_tokens"),
}


def model(family, seed, copies):
    """A block with one layer, and the table in so many copies; a task's layer and table are near the base's."""
    layer, *names = FAMILIES[family]
    x, table = (
        np.random.default_rng(0).standard_normal(shape) + 0.1 * np.random.default_rng(seed).standard_normal(shape)
        for shape in ((WIDTH, WIDTH), (ROWS, WIDTH))
    )
    return {f"{layer}.weight": x.astype(np.float32)} | {f"{n}.weight": table.astype(np.float32) for n in names[:copies]}


def table_of(family):
    return f"{FAMILIES[family][1]}.weight"


@pytest.mark.parametrize("method", ["task_arithmetic", "null_space"])
@pytest.mark.parametrize(("base_copies", "task_copies"), [(1, 9), (9, 1), (9, 9)], ids=str)
@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}], ids=["unsaid", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_are_one_parameter(family, config, base_copies, task_copies, method, tmp_path, nufilt):
    config = {"model_type": family, **config}
    base, tasks = model(family, 0, base_copies), [model(family, seed, task_copies) for seed in (1, 2)]
    for name, tensors in zip(("base", "a", "b"), (base, *tasks), strict=True):
        build.write(tmp_path / name, tensors, **config)
    how = ("--task", f"a={tmp_path / 'a'}", "--task", f"b={tmp_path / 'b'}", "--method", method, "--strict")
    how += ("--filter-rank", 1) if method == "null_space" else ("--method-args", "scale=0.5")
    result = nufilt("merge", "--base", tmp_path / "base", *how, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    found = build.weights(tmp_path / "out")
    assert found.keys() == base.keys()
    table = base[table_of(family)]
    if method == "task_arithmetic":
        table = table + 0.5 * sum(task[table_of(family)] - table for task in tasks)
    for name in FAMILIES[family][1:][:base_copies]:
        np.testing.assert_allclose(found[f"{name}.weight"], table, rtol=1e-5, atol=1e-6)
        assert found[f"{name}.weight"].tobytes() == found[table_of(family)].tobytes()


def opened(tmp_path, tensors, **config):
    return open_checkpoint(str(build.write(tmp_path / "m", tensors, **config))).tensors


def test_copies_without_the_shared_table_have_its_name(tmp_path):
    tensors = model("bart", 0, 4)
    del tensors["model.shared.weight"]
    found = opened(tmp_path, tensors, model_type="bart")
    assert [alias.name for alias in found["model.shared.weight"].aliases] == [
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    ]


LLAMA = ("model.layers.0.mlp.up_proj", "model.embed_tokens", "lm_head")
GPT2 = FAMILIES["gpt2"]
APART = {
    "untied": (GPT2, {"tie_word_embeddings": False}, True),
    "a Llama's, whose config would say so": (LLAMA, {}, True),
    "unequal": (GPT2, {"tie_word_embeddings": True}, False),
    "an encoder's and a decoder's": (("model.encoder.layers.0.fc1", *FAMILIES["bart"][2:4]), {}, False),
    "no copy": (FAMILIES["opt"][:2], {"tie_word_embeddings": True}, False),
    "a head alone": ((GPT2[0], GPT2[2]), {"tie_word_embeddings": True}, False),
}


@pytest.mark.parametrize("case", APART)
def test_what_is_not_tied_keeps_its_name(tmp_path, case):
    names, config, equal = APART[case]
    tensors = {f"{name}.weight": np.full((ROWS, WIDTH), 1.0 if equal else i, "f") for i, name in enumerate(names)}
    assert opened(tmp_path, tensors, model_type="own", **config).keys() == tensors.keys()


def test_a_llama_s_head_alone_stands_for_its_table(tmp_path):
    tensors = {f"{LLAMA[0]}.weight": np.ones((2, 2), "f"), "lm_head.weight": np.ones((3, 2), "f")}
    found = opened(tmp_path, tensors, model_type="llama", tie_word_embeddings=True)
    assert found["model.embed_tokens.weight"].stored_name == "lm_head.weight"


def test_a_table_of_entities_keeps_no_head_from_that_of_words(tmp_path):
    words = np.arange(8, dtype=np.float32).reshape(4, 2)
    stored = {
        "luke.embeddings.word_embeddings.weight": words,
        "luke.entity_embeddings.entity_embeddings.weight": np.ones((3, 2), np.float32),
        "lm_head.decoder.weight": words,
    }
    found = open_checkpoint(str(build.write(tmp_path / "m", stored, model_type="luke")), role="base").tensors
    [copy] = found["luke.embeddings.word_embeddings.weight"].aliases
    assert copy.name == "lm_head.decoder.weight"
