"""transformers 5's torch classes and this package read each other's models."""

import copy
import functools
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from interop_helpers import (
    PROJECTION,
    TEXT,
    VISION,
    assert_close,
    images,
    merged,
    our_features,
    perturbed,
    stored,
)
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    T5Config,
    T5ForConditionalGeneration,
)

import nufilt_jax as nj
from nufilt_jax import zoo

T5 = T5Config(
    vocab_size=40,
    d_model=12,
    d_kv=5,
    d_ff=20,
    num_layers=2,
    num_heads=2,
    relative_attention_num_buckets=8,
    feed_forward_proj="gated-gelu",
    decoder_start_token_id=0,
)
CONFIGS = {
    CLIPVisionModel: CLIPVisionConfig(**VISION),
    CLIPVisionModelWithProjection: CLIPVisionConfig(**VISION, projection_dim=PROJECTION),
    CLIPModel: CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=PROJECTION),
    T5ForConditionalGeneration: T5,
}
CLIP_KINDS = [CLIPVisionModel, CLIPVisionModelWithProjection, CLIPModel]
KINDS = [*CLIP_KINDS, T5ForConditionalGeneration]
by_name = functools.partial(pytest.mark.parametrize, "kind", ids=lambda kind: kind.__name__)


def make(kind, *seeds):
    """A model whose every parameter, biases and norms too, is drawn."""
    torch.manual_seed(0)
    model = kind(copy.deepcopy(CONFIGS[kind])).eval()
    for seed in (0, *seeds):
        rng = np.random.default_rng(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.from_numpy(perturbed(rng, parameter.numpy())))
    return model


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def fine_tuned(kind, tmp_path):
    return [save(make(kind, seed), tmp_path / f"task{seed}") for seed in (1, 2, 3)]


def features(model, pixels):
    with torch.no_grad():
        if isinstance(model, CLIPModel):
            found = model.get_image_features(pixel_values=torch.from_numpy(pixels)).pooler_output
        elif isinstance(model, CLIPVisionModelWithProjection):
            found = model(pixel_values=torch.from_numpy(pixels)).image_embeds
        else:
            found = model(pixel_values=torch.from_numpy(pixels)).pooler_output
    return found.numpy()


def opened(kind, folder, **options):
    """The folder in their class; nothing may be missing, left over or of another shape."""
    model, notes = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(notes.values()), notes
    return model.eval()


def assert_same_parameters(model, other):
    wanted = other.state_dict()
    assert model.state_dict().keys() == wanted.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted[name]), name


@by_name(KINDS)
def test_opening_notices_what_does_not_fit(kind, tmp_path):
    file = save(make(kind), tmp_path / "m") / "model.safetensors"
    tensors = load_file(file)
    name = max(tensors)
    save_file({"more": tensors.pop(name), **tensors}, file, {"format": "pt"})
    with pytest.raises(AssertionError, match=rf"missing_keys.*{name}.*unexpected_keys.*more"):
        opened(kind, tmp_path / "m")


@by_name(CLIP_KINDS)
def test_features(kind, tmp_path):
    model = make(kind)
    folder = save(model, tmp_path / "m")
    assert_close(our_features(folder, images()), features(model, images()))


@by_name(KINDS)
def test_what_we_write_opens_with_every_parameter(kind, tmp_path):
    model = make(kind)
    folder = save(model, tmp_path / "m")
    nj.save(nj.load(str(folder)), tmp_path / "out", like=str(folder))
    assert_same_parameters(opened(kind, tmp_path / "out"), model)


@by_name(CLIP_KINDS)
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["single", "sharded"])
def test_a_merged_model_opens_with_our_features(kind, tmp_path, shards):
    base = save(make(kind), tmp_path / "base", **shards)
    nj.save(merged(base, fine_tuned(kind, tmp_path)), tmp_path / "out", like=str(base))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in base.iterdir()}
    assert stored(tmp_path / "out") == stored(base)
    assert (len(stored(base)) > 1) is bool(shards)
    found = features(opened(kind, tmp_path / "out"), images())
    assert_close(our_features(tmp_path / "out", images()), found)
    assert np.abs(found - features(make(kind), images())).max() > 0.1


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "5KB"}], ids=["single", "sharded"])
def test_a_merged_t5_opens_with_our_tensors(tmp_path, shards):
    kind = T5ForConditionalGeneration
    base = save(make(kind), tmp_path / "base", **shards)
    params = merged(base, fine_tuned(kind, tmp_path))
    nj.save(params, tmp_path / "out", like=str(base))
    assert stored(tmp_path / "out") == stored(base)
    state = opened(kind, tmp_path / "out").state_dict()
    assert state.keys() >= params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(state[name], value)


def test_vision_tasks_merge_into_a_whole_model(tmp_path):
    base = save(make(CLIPModel), tmp_path / "base")
    params = merged(base, fine_tuned(CLIPVisionModel, tmp_path))
    nj.save(params, tmp_path / "out", like=str(base))
    model, before = opened(CLIPModel, tmp_path / "out"), make(CLIPModel).state_dict()
    assert_close(our_features(tmp_path / "out", images()), features(model, images()))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("vision_model.encoder.") for name in moved)


def test_names_of_both_series(tmp_path):
    five = save(make(CLIPVisionModel), tmp_path / "five")
    tensors = load_file(five / "model.safetensors")
    assert "embeddings.class_embedding" in tensors  # 5.x, else this test is void
    four = shutil.copytree(five, tmp_path / "four")
    older = {f"vision_model.{name}": value for name, value in tensors.items()}
    save_file(older, four / "model.safetensors", {"format": "pt"})
    assert nj.load(str(five)).keys() == nj.load(str(four)).keys() == older.keys()
    tasks = fine_tuned(CLIPVisionModel, tmp_path)
    models = []
    for base in (five, four):
        nj.save(merged(base, tasks), tmp_path / f"{base.name}-out", like=str(base))
        assert stored(tmp_path / f"{base.name}-out") == stored(base)
        models.append(opened(CLIPVisionModel, tmp_path / f"{base.name}-out"))
    assert_same_parameters(*models)


@by_name(KINDS)
def test_a_flax_folder_opens_as_safetensors(kind, tmp_path):
    model = make(kind)
    folder = save(model, tmp_path / "m")
    nj.save({}, tmp_path / "flax", like=str(folder), format="flax")
    assert stored(tmp_path / "flax") == {}
    nj.save({}, tmp_path / "out", like=str(tmp_path / "flax"), format="safetensors")
    assert_same_parameters(opened(kind, tmp_path / "out"), model)


@by_name(CLIP_KINDS)
def test_half_precision_is_kept(kind, tmp_path):
    base = save(make(kind).to(torch.bfloat16), tmp_path / "base")
    params = merged(base, fine_tuned(kind, tmp_path))  # of tasks in float32
    assert {value.dtype for value in params.values()} == {np.dtype(ml_dtypes.bfloat16)}
    nj.save(params, tmp_path / "out", like=str(base))
    assert stored(tmp_path / "out") == stored(base)
    assert {parameter.dtype for parameter in opened(kind, tmp_path / "out").parameters()} == {torch.bfloat16}
    found = features(opened(kind, tmp_path / "out", dtype=torch.float32), images())
    assert_close(our_features(tmp_path / "out", images()), found)


@by_name(CLIP_KINDS)
def test_another_type_can_be_written(kind, tmp_path):
    base = save(make(kind), tmp_path / "base")
    nj.save({}, tmp_path / "out", like=str(base), dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_parameters(opened(kind, tmp_path / "out"), make(kind).to(torch.bfloat16))


def test_the_built_in_checkpoints_open(tmp_path):
    tiny = zoo.materialise(tmp_path / "tiny")
    pixels = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    for folder in (tiny.base, *tiny.tasks.values()):
        assert_close(our_features(folder, pixels), features(opened(CLIPVisionModel, folder), pixels))
