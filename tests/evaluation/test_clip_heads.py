"""Heads from a text tower, against one prompt at a time; and their cache."""

import image_models as build
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import nufilt_jax as nj
from nufilt_jax.errors import CheckpointError, ConfigError
from nufilt_jax.evaluation.clip import heads as clip_heads
from nufilt_jax.evaluation.clip.heads import TextHeads

TEMPLATES = ("a photo of a {}.", "of the {} to a red photo.", "{}")
CLASSES = (*build.CLASSES, "q", "zebra to red zebra")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build.write_model(tmp_path_factory.mktemp("text") / "model", build.params())


def without(name):
    return {key: value for key, value in build.params().items() if key != name}


def by_hand(folder, params, classes=CLASSES, templates=TEMPLATES):
    """One class after the other, one prompt after the other, padded to one length: compiled once."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    head = []
    for name in classes:
        total = np.zeros(5)
        for template in templates:
            tokens = tokenizer.encode(template.format(name)).ids
            ids = jnp.asarray([tokens + [0] * (40 - len(tokens))])
            mask = jnp.arange(40)[None] < len(tokens)
            feature = nj.models.clip_text_features(params, ids, mask, build.CONFIG)
            total += np.asarray(feature[0], np.float64) / np.linalg.norm(feature)
        head.append(total / np.linalg.norm(total))
    return np.array(head)


def test_heads_are_means_over_templates(folder, monkeypatch):
    monkeypatch.setattr(clip_heads, "_BATCH", 4)  # 15 prompts: the last batch is not full
    params = build.params()
    head = TextHeads(params, build.CONFIG, folder, cache=None)(CLASSES, TEMPLATES)
    assert head.dtype == np.float32
    np.testing.assert_allclose(head, by_hand(folder, params), atol=1e-5)
    # The test means nothing if templates or classes hardly differ.
    alone = TextHeads(params, build.CONFIG, folder, cache=None)(CLASSES, TEMPLATES[:1])
    assert np.abs(head - alone).max() > 0.05
    assert min(np.abs(a - b).max() for i, a in enumerate(head) for b in head[:i]) > 0.003


def test_long_prompts_are_cut_before_the_end_token(folder):
    heads = TextHeads(build.params(), build.CONFIG, folder, cache=None)
    long = "zebra " * 30
    found = heads([long, long + "zebra", "q"], ["{}"])
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0.05


def test_the_projection_for_images_comes_along(folder):
    found = TextHeads(build.params(), build.CONFIG, folder, cache=None).visual_projection
    np.testing.assert_array_equal(found, build.params()["visual_projection.weight"])
    assert TextHeads(without("visual_projection.weight"), build.CONFIG, folder, cache=None).visual_projection is None


def test_a_head_is_made_once(folder, tmp_path, monkeypatch):
    first = TextHeads(build.params(), build.CONFIG, folder, cache=tmp_path / "heads")(CLASSES, TEMPLATES)
    [path] = (tmp_path / "heads").iterdir()
    np.testing.assert_array_equal(load_file(path)["head"], first)
    monkeypatch.setattr(TextHeads, "_embeddings", None)  # cannot be called
    again = TextHeads(build.params(), build.CONFIG, folder, cache=tmp_path / "heads")(CLASSES, TEMPLATES)
    np.testing.assert_array_equal(again, first)


def test_anything_else_is_another_head(folder, tmp_path):
    cache = tmp_path / "heads"

    def make(params, classes=CLASSES, templates=TEMPLATES, folder=folder):
        return TextHeads(params, build.CONFIG, folder, cache=cache)(classes, templates)

    other = build.params()
    other["text_model.final_layer_norm.bias"] = other["text_model.final_layer_norm.bias"] + 1
    elsewhere = build.write_model(tmp_path / "model", build.params())
    text = (elsewhere / "tokenizer.json").read_text()
    assert '"q</w>"' in text
    (elsewhere / "tokenizer.json").write_text(text.replace('"q</w>"', '"?</w>"').replace('"a</w>"', '"q</w>"'))
    calls = [
        {"params": build.params()},
        {"params": other},
        {"params": build.params(), "classes": CLASSES[:-1]},
        {"params": build.params(), "templates": TEMPLATES[:-1]},
        {"params": build.params(), "folder": elsewhere},
    ]
    for n_heads, call in enumerate(calls, start=1):
        make(**call)
        assert len([*cache.iterdir()]) == n_heads
    vision = build.params() | {"vision_model.post_layernorm.bias": np.ones(8, np.float32)}
    make(vision)  # has no say
    assert len([*cache.iterdir()]) == len(calls)


def test_a_broken_cache_is_mended_and_none_is_no_obstacle(folder, tmp_path):
    heads = TextHeads(build.params(), build.CONFIG, folder, cache=tmp_path)
    head = heads(CLASSES, TEMPLATES)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    np.testing.assert_array_equal(heads(CLASSES, TEMPLATES), head)
    np.testing.assert_array_equal(load_file(path)["head"], head)
    (tmp_path / "file").write_text("in the way")
    blocked = TextHeads(build.params(), build.CONFIG, folder, cache=tmp_path / "file")
    np.testing.assert_array_equal(blocked(CLASSES, TEMPLATES), head)


@pytest.mark.parametrize(
    ("vision", "advice"),
    [
        ({"hidden_size": 768, "patch_size": 32}, "openai/clip-vit-base-patch32"),
        ({"hidden_size": 768, "patch_size": 16}, "openai/clip-vit-base-patch16"),
        ({"hidden_size": 1024, "patch_size": 14}, "openai/clip-vit-large-patch14"),
        ({"hidden_size": 8, "patch_size": 4}, "a whole CLIP model with the same vision tower"),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_a_vision_half_is_refused_with_what_to_give(folder, vision, advice, nested):
    config = {"model_type": "clip", "vision_config": vision} if nested else {"model_type": "clip_vision_model"} | vision
    with pytest.raises(CheckpointError) as caught:
        TextHeads(build.vision_half(build.params()), config, folder, cache=None)
    what = "has no text tower, and zero-shot heads are made with it"
    assert str(caught.value) == f"{folder}: {what} (give heads_from {advice})"


def test_what_does_not_fit_is_refused(folder, tmp_path):
    params = build.params()
    with pytest.raises(CheckpointError, match="has no text projection"):
        TextHeads(without("text_projection.weight"), build.CONFIG, folder, cache=None)
    wrong = params | {"text_model.final_layer_norm.bias": np.ones(7, np.float32)}
    with pytest.raises(CheckpointError, match=r"text_model\.final_layer_norm\.bias: shape is \(7,\)"):
        TextHeads(wrong, build.CONFIG, folder, cache=None)
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        TextHeads(params, build.CONFIG, tmp_path, cache=None)(CLASSES, TEMPLATES)
    small = {**build.CONFIG, "text_config": build.CONFIG["text_config"] | {"vocab_size": 50}}
    fewer = params | {"text_model.embeddings.token_embedding.weight": np.ones((50, 6), np.float32)}
    with pytest.raises(CheckpointError, match="makes token 59, and the model has 50"):
        TextHeads(fewer, small, folder, cache=None)(CLASSES, TEMPLATES)
    dead = params | {"text_projection.weight": np.zeros((5, 6), np.float32)}
    with pytest.raises(ConfigError, match="a class embedding is zero"):
        TextHeads(dead, build.CONFIG, folder, cache=None)(CLASSES, TEMPLATES)
