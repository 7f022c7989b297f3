"""One pass over a weight file: its hash, what cannot be used, and how far a task moved."""

import ml_dtypes
import numpy as np
import pytest
from checkpoint_builders import (
    DTYPES,
    clip_model,
    flax_vision_tree,
    t5_model,
    vision_tower,
    write_flax,
    write_safetensors,
)

from nufilt_jax.checkpoints import open_checkpoint, survey, survey_file
from nufilt_jax.checkpoints.outputs import new_types

FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"


def surveyed(checkpoint, **how):
    """The findings in all files, by file."""
    files = {
        path: [info for info in checkpoint.tensors.values() if info.file == path] for path in checkpoint.weight_files
    }
    return {path.name: survey_file(path, infos, **how) for path, infos in files.items()}


@pytest.mark.parametrize("kind", ["one file", "shards", "flax"])
def test_the_hash_is_of_every_byte(tmp_path, kind):
    if kind == "flax":
        checkpoint = open_checkpoint(str(write_flax(tmp_path / "m", flax_vision_tree(vision_tower()))))
    else:
        checkpoint = open_checkpoint(
            str(write_safetensors(tmp_path / "m", clip_model(), shards=1 + (kind == "shards")))
        )
    assert {name: found.sha256 for name, found in surveyed(checkpoint).items()} == checkpoint.sha256()
    assert survey_file(checkpoint.weight_files[0], ()).sha256 in checkpoint.sha256().values()


def test_every_byte_is_read_once(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(str(write_safetensors(tmp_path / "m", clip_model())))
    stream, read = survey.stream_spans, []

    def counted(path, spans, **how):
        for piece in stream(path, spans, **how):
            read.append(len(piece))
            yield piece

    monkeypatch.setattr(survey, "stream_spans", counted)
    surveyed(checkpoint, base=checkpoint.tensors, new_types=dict.fromkeys(checkpoint.tensors, "F16"))
    assert sum(read) == checkpoint.weight_files[0].stat().st_size


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_nonfinite_tensors_are_found(tmp_path, dtype, bad):
    good = np.full((3, 700), ml_dtypes.finfo(dtype).max, dtype)  # the sum overflows, no term does
    sick = good.copy()
    sick[2, 699] = bad
    tensors = {"a": good, "b": sick, "c": -good, "i": np.arange(3), "e": np.zeros((0, 4), dtype)}
    checkpoint = open_checkpoint(str(write_safetensors(tmp_path / "m", tensors)))
    assert surveyed(checkpoint)["model.safetensors"].nonfinite == {"b"}


@pytest.mark.parametrize("task_type", DTYPES)
@pytest.mark.parametrize("base_type", DTYPES)
def test_changes_are_squared_and_summed(tmp_path, base_type, task_type, monkeypatch):
    monkeypatch.setattr(survey, "_BLOCK", 5)
    base, task = clip_model(0, base_type), clip_model(1, task_type)
    task["logit_scale"] = base["logit_scale"].astype(DTYPES[task_type])
    one = open_checkpoint(str(write_safetensors(tmp_path / "base", base, shards=2)))
    other = open_checkpoint(str(write_safetensors(tmp_path / "task", task, shards=3)))
    changes = {name: x for found in surveyed(other, base=one.tensors).values() for name, x in found.changes.items()}
    assert changes.keys() == {name for name in base if "position_ids" not in name}
    for name, found in changes.items():
        expected = np.sum((task[name].astype(np.float64) - base[name].astype(np.float64)) ** 2)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_tensor_that_did_not_move_has_changed_by_nothing(tmp_path):
    checkpoint = open_checkpoint(str(write_safetensors(tmp_path / "m", clip_model(dtype="bfloat16"))))
    changes = surveyed(checkpoint, base=checkpoint.tensors)["model.safetensors"].changes
    assert len(changes) > 10 and set(changes.values()) == {0.0}


@pytest.mark.parametrize("kinds", [("flax", "torch"), ("torch", "flax"), ("flax", "flax")])
def test_changes_between_files_that_store_their_axes_otherwise(tmp_path, kinds):
    models = []
    for kind, seed in zip(kinds, (0, 1), strict=True):
        tower = vision_tower(seed)
        folder = tmp_path / f"{kind}{seed}"
        write = write_safetensors(folder, tower) if kind == "torch" else write_flax(folder, flax_vision_tree(tower))
        models.append(open_checkpoint(str(write)))
    [found] = surveyed(models[1], base=models[0].tensors).values()
    base, task = vision_tower(0), vision_tower(1)
    assert found.changes.keys() == base.keys()
    for name, change in found.changes.items():
        assert change == pytest.approx(float(((task[name] - base[name]).astype(np.float64) ** 2).sum()), rel=1e-6)


def test_arrays_that_flax_split(tmp_path, monkeypatch):
    from flax import serialization

    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 16)
    models = [open_checkpoint(str(write_flax(tmp_path / f"m{i}", flax_vision_tree(vision_tower(i))))) for i in (0, 1)]
    assert len(models[1].tensors[FC1].spans) > 1
    [found] = surveyed(models[1], base=models[0].tensors).values()
    expected = ((vision_tower(1)[FC1] - vision_tower(0)[FC1]).astype(np.float64) ** 2).sum()
    assert found.changes[FC1] == pytest.approx(float(expected), rel=1e-6)


def test_what_cannot_be_compared_is_not(tmp_path):
    base = {"a": np.zeros((2, 2), np.float32), "n": np.zeros(2, np.float32), "i": np.arange(3)}
    task = {"a": np.zeros((2, 3), np.float32), "n": np.array([1, np.nan], np.float32), "i": np.arange(3) + 1}
    task["more"] = np.zeros(1, np.float32)
    one, other = (open_checkpoint(str(write_safetensors(tmp_path / n, x))) for n, x in (("b", base), ("t", task)))
    [found] = surveyed(other, base=one.tensors).values()
    assert found.changes.keys() == {"n"} and np.isnan(found.changes["n"])


def test_numbers_out_of_the_range_of_their_new_type(tmp_path):
    tensors = {
        "fits": np.full(3, 65504, np.float32),
        "large": np.array([0, 1e5, 0], ml_dtypes.bfloat16),
        "infinite": np.array([np.inf], np.float32),  # as it was
        "wide": np.array([1e39]),
        "i": np.array([1 << 40]),
    }
    checkpoint = open_checkpoint(str(write_safetensors(tmp_path / "m", tensors)))
    for code, lost in (("F16", {"large", "wide"}), ("BF16", {"wide"}), ("F32", {"wide"})):
        types = new_types(checkpoint, code)
        assert "i" not in types and all(new == code for new in types.values())
        assert surveyed(checkpoint, new_types=types)["model.safetensors"].out_of_range == lost
    assert new_types(checkpoint, None) == {}


def test_tied_copies_are_one_tensor(tmp_path):
    copies = ("encoder.embed_tokens.weight",)
    models = [
        open_checkpoint(str(write_safetensors(tmp_path / f"m{i}", t5_model(i, copies), model_type="t5")))
        for i in (0, 1)
    ]
    [found] = surveyed(models[1], base=models[0].tensors).values()
    assert "shared.weight" in found.changes and copies[0] not in found.changes
    assert found.sha256 == models[1].sha256()["model.safetensors"]
