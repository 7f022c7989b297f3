"""What an output holds beside the merged weights: the same from the Hub as from a folder."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_builders import folder_bytes, vision_tower, write_safetensors
from safetensors.numpy import save_file

from nufilt_jax.checkpoints import load, open_checkpoint, save
from nufilt_jax.checkpoints.beside import files_beside, names_below
from nufilt_jax.checkpoints.folders import no_weights_problem
from nufilt_jax.errors import CheckpointError

PART = {"linear.weight": np.ones((2, 2), np.float32)}

KEPT = (
    *("config.json", "README.md", "LICENSE", ".gitattributes", "vocab.txt", "spiece.model", "chat_template.jinja"),
    *("modeling_own.py", "qwen.tiktoken", "bpe.codes", "merges.txt", "photo.png", "sub.folder/notes", "modules.json"),
    *("mel_filters.npz", "audio/mel_filters.npz"),
    *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "3_Dense/pytorch_model.bin"),
    *("speech-lora/adapter_config.json", "speech-lora/adapter_model.safetensors", "speech-lora/sub/notes.txt"),
    *("tokenizer.pkl", "words/vocab.pkl", "runs/notes.txt", "sub.folder/latest", "results.json", "latest.txt"),
    *("tower/model-00001-of-00002.safetensors", "tower/model.safetensors.index.json", "flax/flax_model.msgpack"),
)
LEFT = (
    *(
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-4bit.safetensors",
    ),
    *("model.safetensors.index.fp16.json", "consolidated.00.pth", "flax_model.msgpack", "tf_model.h5", "rust_model.ot"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "model.ckpt.index"),
    *("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json", "model-Q4_K.gguf"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "quantize_config.json"),
    *("quant_config.json", "hf_quant_config.json", "onnx/model.onnx", "onnx/model.onnx_data", "onnx/config.json"),
    *("openvino/openvino_model.xml", "openvino/openvino_model.bin", "other/model.onnx", "other/config.json"),
    *("other/deeper/notes.txt", "2_Dense/pytorch_model.bin", "2_Dense/onnx/model.onnx", "voices/pytorch_model.bin"),
    *("original/model.safetensors", "original/params.json", "original/deep/x.json", "tower/pytorch_model.bin"),
    *("checkpoint-500/model.safetensors", "checkpoint-500/config.json", "last-checkpoint/config.json"),
    *("global_step12/mp_rank_00_model_states.pt", ".git/config", ".git/lfs/x", ".cache/huggingface/x", "state/d/x"),
    *("__pycache__/modeling_own.cpython-311.pyc", "nufilt.json", "forecast.json", "analysis/affinity.png"),
    *("merged/nufilt.json", "merged/model.safetensors", "merged/state/x", "tower/flax_model.msgpack"),
    *(
        "pytorch_model_fsdp_0/__0_0.distcp",
        "pytorch_model_fsdp_0/.metadata",
        "optimizer_0/__0_0.distcp",
        "__0_0.distcp",
    ),
    *(".metadata", "latest", "zero_to_fp32.py", "runs/Nov29/events.out.tfevents.1.host.2.0", "events.out.tfevents.1"),
    *("wandb/run-1/files/output.log", "trainer_log.jsonl", "training_args.json", "all_results.json", "nohup.out"),
    *("eval_results.json", "model.safetensors.tmp", ".model.safetensors.aria2", "random_states_0.pkl", "vocab.bin"),
    *("model.npz", "flax_model.npz", "weights-3.npz", "params.npz", "old/model.npz", "old/config.json"),
)


def test_every_file_is_kept_or_left_by_its_name():
    assert files_beside(reversed(KEPT + LEFT)) == sorted(KEPT)


def test_pickles_of_a_subfolder_are_no_part_of_other_models():
    assert files_beside(["3_Dense/pytorch_model.bin", "3_Dense/config.json"]) == []


@pytest.fixture
def base(tmp_path):
    """A base with all of them."""
    folder = write_safetensors(tmp_path / "base", vision_tower())
    for name in KEPT + LEFT:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() and "index" not in name:
            path.write_text(name)
    save_file(PART, folder / "2_Dense" / "model.safetensors")
    return folder


def test_a_saved_model_holds_them(tmp_path, base):
    save(load(str(base)), tmp_path / "out", like=str(base))
    there = {name: data for name, data in folder_bytes(base).items() if name in (*KEPT, "tokenizer.json")}
    assert folder_bytes(tmp_path / "out") == there | {"model.safetensors": (base / "model.safetensors").read_bytes()}


def test_merged_shards_in_a_subfolder_are_not_overwritten(tmp_path):
    folder = write_safetensors(tmp_path / "base", vision_tower())
    (folder / "sub").mkdir()
    (folder / "model.safetensors").rename(folder / "sub" / "part.safetensors")
    (folder / "sub" / "note.txt").write_text("kept")
    index = {"weight_map": dict.fromkeys(vision_tower(), "sub/part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    changed = {name: np.zeros_like(x) for name, x in vision_tower().items() if x.dtype == np.float32}
    save(changed, tmp_path / "out", like=str(folder))
    assert not any(x.any() for name, x in load(str(tmp_path / "out")).items() if name in changed)
    assert (tmp_path / "out" / "sub" / "note.txt").read_text() == "kept"


def test_an_output_inside_the_base_is_no_part_of_it(base):
    save(load(str(base)), base / "out", like=str(base))
    assert not (base / "out" / "out").exists()


@pytest.mark.parametrize("model", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", ""])
def test_a_diffusers_pipeline_names_its_components(tmp_path, model):
    (tmp_path / "model_index.json").write_text("{}")
    if model:
        (tmp_path / model).parent.mkdir()
        save_file(PART, tmp_path / model)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path))
    [problem] = caught.value.problems
    assert problem.what == "is a diffusers pipeline: its components are models of their own"
    assert problem.fix.endswith(str(tmp_path / model.split("/")[0]) if model else "save it again, without a variant")


def test_what_a_diffusers_pipeline_names_can_be_opened(tmp_path):
    """And its component keeps the names of its files."""
    (tmp_path / "model_index.json").write_text("{}")
    for file in ("vae/diffusion_pytorch_model.fp16.safetensors", "scheduler/scheduler_config.json"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_bytes(b"")
    component = write_safetensors(tmp_path / "unet", {"conv_in.weight": np.ones((2, 2), np.float32)})
    write_safetensors(tmp_path / "transformer", {"a.weight": PART["linear.weight"], "b": np.ones(2, "f")}, shards=2)
    (component / "model.safetensors").rename(component / "diffusion_pytorch_model.safetensors")
    sharded = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / "transformer" / "model.safetensors.index.json").rename(sharded)
    with pytest.raises(CheckpointError, match="is a diffusers pipeline") as caught:
        open_checkpoint(str(tmp_path))
    given = caught.value.problems[0].fix.removeprefix("give the folder of one: ").split(", ")
    assert given == [str(tmp_path / "transformer"), str(component)]
    for folder in given:
        save({}, tmp_path / "out", like=folder)
        assert folder_bytes(tmp_path / "out") == folder_bytes(Path(folder))
        shutil.rmtree(tmp_path / "out")


def test_a_pipeline_on_the_hub_is_to_be_downloaded():
    names = ["model_index.json", "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"]
    problem = no_weights_problem("org/pipeline", names)
    assert problem.fix == "download it and give the folder of one: unet"


def test_a_link_out_of_the_folder_is_not_copied(tmp_path, nufilt, refused):
    """A stranger's model could name a private file; the Hub's cache has links to its own blobs."""
    base = tmp_path / "models--org--base" / "snapshots" / "abc"
    base.mkdir(parents=True)
    save_file(PART, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    blob = base.parents[1] / "blobs" / "0123"
    blob.parent.mkdir()
    blob.write_text("vocabulary")
    (base / "vocab.txt").symlink_to("../../blobs/0123")
    (base / "same.txt").symlink_to("vocab.txt")
    task = ("merge", "--base", base, "--task", f"a={base}", "--layers", ".", "--method", "sum")
    assert nufilt(*task, "--out", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "vocab.txt").read_text() == (tmp_path / "out" / "same.txt").read_text() == "vocabulary"
    (tmp_path / "key").write_text("private")
    (base / "tokenizer.json").symlink_to(tmp_path / "key")
    [line] = refused(*task, "--out", tmp_path / "none")
    assert "tokenizer.json: is a link to " in line and "outside the model's folder" in line
    with pytest.raises(CheckpointError, match="is a link to"):
        save(load(str(base)), tmp_path / "saved", like=str(base))


def test_a_file_that_git_lfs_did_not_fetch_is_not_copied(tmp_path, nufilt, refused):
    """A clone in which the weights alone were pulled; an adapter holds no such files."""
    base = write_safetensors(tmp_path / "base", vision_tower())
    for name in ("spiece.model", "sub/tokenizer.json"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    given = ("--base", base, "--task", f"a={base}", "--method", "sum")
    for command in (("merge", *given, "--out", tmp_path / "none"), ("plan", *given)):
        assert refused(*command) == [
            f"nufilt: {base / name}: is a Git LFS pointer, not the file itself (run in the clone: git lfs pull)"
            for name in ("spiece.model", "sub/tokenizer.json")
        ]
    with pytest.raises(CheckpointError, match="is a Git LFS pointer"):
        save(load(str(base)), tmp_path / "saved", like=str(base))


@pytest.fixture
def locked(monkeypatch):
    """Locks files and folders as permissions do, which do not bind the user that tests may run as."""
    paths = set[str]()

    def guarded(function):
        def call(path, *args, **options):
            if str(path) in paths:
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **options)

        return call

    for module, name in ((io, "open"), (os, "scandir")):
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))
    return paths


def test_what_cannot_be_read_beside_the_weights_is_told_before_any_work(tmp_path, nufilt, locked):
    """A copy without it would not be the base's."""
    base = write_safetensors(tmp_path / "base", vision_tower())
    for name in ("tok.txt", "sub/tokenizer.json", "lost+found/x", "checkpoint-5/x", "state/x"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    given = ("--base", base, "--task", f"a={base}", "--method", "sum")
    locked |= {str(base / name) for name in ("lost+found", "checkpoint-5", "state")}  # no part of the model
    assert nufilt("plan", *given).code == 0
    locked |= {str(base / name) for name in ("tok.txt", "sub")}
    for command in (("merge", *given, "--out", tmp_path / "none"), ("plan", *given)):
        assert nufilt(*command).err.splitlines() == [
            f"nufilt: {base / name}: cannot be read: Permission denied (check the folder and its permissions)"
            for name in ("sub", "tok.txt")
        ]
    assert not (tmp_path / "none").exists()
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        save(load(str(base)), tmp_path / "saved", like=str(base))


def test_files_of_a_folder_whose_names_alone_can_be_read_are_told(tmp_path, monkeypatch):
    """As a folder without the permission to enter it."""
    base = write_safetensors(tmp_path / "base", vision_tower())
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").write_text("x")

    def stat(path, **options):
        if path.name == "notes.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return os.stat(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert "sub/notes.txt" in names_below(base)
