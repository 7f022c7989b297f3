"""Folders that are often given in the place of a model's: what is told, and which to give."""

import shutil

import pytest
from checkpoint_builders import vision_tower, write_safetensors

from nufilt_jax.checkpoints import open_checkpoint
from nufilt_jax.checkpoints.folders import no_weights_problem
from nufilt_jax.errors import CheckpointError


def filled(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return str(folder)


def refusal(source):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    [problem] = caught.value.problems
    return problem


def test_a_run_s_folder_names_its_checkpoints(tmp_path):
    root = filled(tmp_path, "training_args.bin", "runs/events", "README.md", "checkpoint-9000/notes.txt")
    for step in (500, 1500, 1000):
        write_safetensors(tmp_path / f"checkpoint-{step}", vision_tower())
    problem = refusal(root)
    assert problem[:2] == (root, "holds no weights of its own, but its subfolders do")
    given = [f"{root}/checkpoint-{step}" for step in (500, 1000, 1500)]
    assert problem.fix == f"give the folder of one: {', '.join(given)}"
    for folder in given:
        open_checkpoint(folder)


def test_of_many_checkpoints_the_last_are_named(tmp_path):
    root = filled(tmp_path, *(f"checkpoint-{step}/model.safetensors" for step in range(1, 31)))
    assert refusal(root).fix.endswith(f"{root}/checkpoint-30, or one of 22 others")


def test_a_save_of_several_adapters_names_them(tmp_path):
    adapters = (
        f"{name}/{file}" for name in ("en", "de") for file in ("adapter_config.json", "adapter_model.safetensors")
    )
    root = filled(tmp_path, "README.md", *adapters)
    assert refusal(root).fix == f"give the folder of one: {root}/de, {root}/en"


def test_a_model_of_the_hub_s_cache_names_its_snapshots(tmp_path):
    root = filled(tmp_path / "models--o--m", "refs/main", "blobs/0", "snapshots/abc/model.safetensors")
    assert refusal(root).fix == f"give the folder of one: {root}/snapshots/abc"


def test_a_repository_of_subfolders_is_to_be_downloaded():
    problem = no_weights_problem("org/run", ["README.md", "last/model.safetensors", "last/optimizer.pt"])
    assert problem.what == "holds no weights of its own, but its subfolders do"
    assert problem.fix == "download it and give the folder of one: last"


@pytest.mark.parametrize("pieces", ["", "global_step5/"])
def test_a_checkpoint_of_deepspeed_names_its_converter(tmp_path, pieces):
    root = filled(tmp_path, "latest", f"{pieces}mp_rank_00_model_states.pt", f"{pieces}zero_pp_rank_0_optim_states.pt")
    for given in {root, f"{root}/{pieces}".rstrip("/")}:
        problem = refusal(given)
        assert problem[:2] == (
            f"{root}/{pieces}".rstrip("/"),
            "is a checkpoint of DeepSpeed, which holds the weights in pieces",
        )
        assert problem.fix.endswith(f"python zero_to_fp32.py {root} OUT --safe_serialization")


@pytest.mark.parametrize("pieces", ["", "/pytorch_model_fsdp_0"])
def test_a_distributed_checkpoint_of_torch_names_its_converter(tmp_path, pieces):
    root = filled(tmp_path, "config.json")
    folder = filled(tmp_path / pieces.strip("/"), ".metadata", "__0_0.distcp", "__1_0.distcp")
    problem = refusal(root)
    assert problem[:2] == (folder, "is a distributed checkpoint of torch, which holds the weights in pieces")
    assert problem.fix == f"put them together: accelerate merge-weights {folder} OUT"


def test_weights_of_its_own_are_told_first(tmp_path):
    """As of an older sentence-transformers model, which its last layer is not."""
    root = filled(
        tmp_path, "pytorch_model.bin", "training_args.bin", "2_Dense/model.safetensors", "global_step5/a.distcp"
    )
    assert refusal(root).where == f"{root}/pytorch_model.bin"
    shutil.rmtree(tmp_path / "2_Dense")
    assert refusal(root).where == f"{root}/pytorch_model.bin"


def test_an_adapter_of_mlx_is_to_be_fused(tmp_path):
    root = filled(tmp_path, "adapter_config.json", "adapters.safetensors", "0000100_adapters.safetensors")
    problem = refusal(root)
    assert problem.what == "is an adapter of MLX, which is not read"
    assert problem.fix.endswith(f"mlx_lm.fuse --model BASE --adapter-path {root}")


def test_an_adapter_beside_a_whole_model_is_said_to_be_left(tmp_path, nufilt):
    """Which transformers would put onto it, and take the whole for the model."""
    for name, shards in (("base", 1), ("task", 2)):
        write_safetensors(tmp_path / name, vision_tower(), shards=shards)
    given = ("plan", "--base", tmp_path / "base", "--task", f"a={tmp_path / 'task'}", "--method", "sum")
    quiet = nufilt(*given)
    assert quiet.code == 0 and "adapter" not in quiet.err
    for name in ("base", "task"):
        filled(tmp_path / name, "adapter_config.json", "adapter_model.safetensors")
    loud = nufilt(*given)
    assert loud.code == 0
    for name in ("base", "task"):
        assert f"{tmp_path / name}: model.safetensors is read, and the adapter beside it is not" in loud.err
