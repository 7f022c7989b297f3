import errno
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_builders import (
    DTYPES,
    bits_equal,
    clip_model,
    flax_vision_tree,
    folder_bytes,
    t5_model,
    vision_tower,
    write_config,
    write_flax,
    write_index,
    write_safetensors,
)
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from nufilt_jax.checkpoints import load, open_checkpoint, save, write_checkpoint
from nufilt_jax.errors import CheckpointError, ConfigError, OutputError

FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"


def saved(folder, tmp_path, params=None, **options):
    save(load(str(folder)) if params is None else params, tmp_path / "out", like=str(folder), **options)
    return tmp_path / "out"


def make(kind, folder):
    if kind == "flax":
        return write_flax(folder, flax_vision_tree(vision_tower()))
    if kind == "t5":
        copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
        return write_safetensors(folder, t5_model(tied_copies=copies), model_type="t5", shards=2)
    if kind == "names of 5.x":
        return write_safetensors(folder, vision_tower(prefix=""))
    dtype, shards = kind
    return write_safetensors(folder, clip_model(dtype=dtype), shards=shards)


@pytest.mark.parametrize("copied", [False, True], ids=["given", "copied"])
@pytest.mark.parametrize(
    "kind",
    ["flax", "t5", "names of 5.x", ("float32", 1), ("float32", 3), ("bfloat16", 2), ("float16", 1)],
    ids=str,
)
def test_round_trip_keeps_every_byte_of_every_file(tmp_path, kind, copied):
    folder = make(kind, tmp_path / "m")
    out = saved(folder, tmp_path, params={} if copied else None)
    assert folder_bytes(out) == folder_bytes(folder)


def test_flax_shards_keep_every_byte(tmp_path):
    folder = write_flax(tmp_path / "m", flax_vision_tree(vision_tower()))
    (folder / "flax_model.msgpack").rename(folder / "flax_model-00001-of-00001.msgpack")
    names = flatten_dict(flax_vision_tree(vision_tower()), sep="/")
    total = sum(value.nbytes for value in names.values())
    weight_map = dict.fromkeys(names, "flax_model-00001-of-00001.msgpack")
    write_index(folder, weight_map, total, "flax_model.msgpack.index.json")
    assert folder_bytes(saved(folder, tmp_path)) == folder_bytes(folder)


def test_only_given_tensors_change(tmp_path):
    folder = write_safetensors(tmp_path / "m", clip_model(), shards=2, metadata={"format": "pt", "who": "me"})
    new = {FC1: np.full((6, 4), 7, np.float32), "logit_scale": np.float32(3)}
    out = saved(folder, tmp_path, params=new)
    for path in folder.glob("*.safetensors"):
        before, after = load_file(path), load_file(out / path.name)
        assert before.keys() == after.keys()
        assert all(bits_equal(after[n], np.asarray(new.get(n, before[n]))) for n in before)
        assert b'"who":"me"' in (out / path.name).read_bytes()
    assert new[FC1].shape == (6, 4) and set(new) == {FC1, "logit_scale"}  # the caller's own


def test_values_go_back_into_the_orientation_of_flax(tmp_path):
    folder = write_flax(tmp_path / "m", flax_vision_tree(vision_tower()))
    new = vision_tower(seed=9)
    out = saved(folder, tmp_path, params={name: jnp.asarray(value) for name, value in new.items()})
    tree = flatten_dict(msgpack_restore((out / "flax_model.msgpack").read_bytes()))
    expected = flatten_dict(flax_vision_tree(new))
    assert tree.keys() == expected.keys()
    assert all(bits_equal(tree[path], np.ascontiguousarray(expected[path])) for path in tree)


@pytest.mark.parametrize("given", ["shared.weight", "decoder.embed_tokens.weight"])
def test_tied_copies_stay_equal(tmp_path, given):
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    folder = write_safetensors(tmp_path / "m", t5_model(tied_copies=copies), model_type="t5")
    new = np.arange(36, dtype=np.float32).reshape(9, 4)
    after = load_file(saved(folder, tmp_path, params={given: new}) / "model.safetensors")
    assert all(bits_equal(after[name], new) for name in ("shared.weight", *copies))
    assert after.keys() == load_file(folder / "model.safetensors").keys()


def test_rounds_to_nearest_even_and_checks_the_range(tmp_path):
    base = {"w": np.zeros(4, ml_dtypes.bfloat16), "h": np.zeros(2, np.float16)}
    folder = write_safetensors(tmp_path / "m", base)
    ulp = 2.0**-7  # of bfloat16 at 1
    new = np.array([1 + ulp / 2, 1 + 3 * ulp / 2, -(1 + ulp / 2), 1 + 0.51 * ulp], np.float32)
    after = load_file(saved(folder, tmp_path, params={"w": new}) / "model.safetensors")
    assert after["w"].astype(np.float32).tolist() == [1, 1 + 2 * ulp, -1, 1 + ulp]
    with pytest.raises(CheckpointError, match=r"model\.safetensors: h: has numbers out of the range of float16"):
        save({"h": np.array([1, 1e6], np.float32)}, tmp_path / "out2", like=str(folder))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_dtype_converts_every_float_and_no_integer(tmp_path, stored, dtype):
    tensors = clip_model(dtype=stored)
    folder = write_safetensors(
        tmp_path / "m",
        tensors,
        shards=2,
        torch_dtype=stored,
        vision_config={"dtype": stored, "hidden_size": 4},
        architectures=["CLIPModel"],
    )
    out = saved(folder, tmp_path, params={}, dtype=dtype)
    after = open_checkpoint(str(out), role="base").read()
    for name, value in tensors.items():
        is_float = name != "text_model.embeddings.position_ids"
        assert bits_equal(after[name], value.astype(DTYPES[dtype]) if is_float else value)
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == config["vision_config"]["dtype"] == dtype
    assert config["architectures"] == ["CLIPModel"] and config["vision_config"]["hidden_size"] == 4
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in after.values())


@pytest.mark.parametrize("alias", ["flax", "msgpack"])
def test_formats_convert_into_each_other(tmp_path, alias):
    folder = write_safetensors(tmp_path / "m", vision_tower(prefix=""), shards=2)
    flax = saved(folder, tmp_path, params={}, format=alias)
    assert {p.name for p in flax.iterdir()} == {"flax_model.msgpack", "config.json", "tokenizer.json"}
    tree = flatten_dict(msgpack_restore((flax / "flax_model.msgpack").read_bytes()))
    expected = flatten_dict(flax_vision_tree(vision_tower()))
    assert tree.keys() == expected.keys()
    assert all(bits_equal(tree[path], np.ascontiguousarray(expected[path])) for path in tree)
    save({}, tmp_path / "back", like=str(flax), format="safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert after.keys() == vision_tower().keys()
    assert all(bits_equal(after[name], value) for name, value in vision_tower().items())
    assert b'"__metadata__":{"format":"pt"}' in (tmp_path / "back" / "model.safetensors").read_bytes()


def test_flax_form_of_t5_has_neither_copies_nor_buffers(tmp_path):
    tensors = t5_model(tied_copies=("encoder.embed_tokens.weight",))
    tensors["position_ids"] = np.arange(3)
    folder = write_safetensors(tmp_path / "m", tensors, model_type="t5", tie_word_embeddings=False)
    out = saved(folder, tmp_path, params={}, format="flax")
    tree = flatten_dict(msgpack_restore((out / "flax_model.msgpack").read_bytes()), sep="/")
    layer = "encoder/block/0/layer/0/"
    assert set(tree) == {
        "shared/embedding",
        "lm_head/kernel",
        layer + "SelfAttention/q/kernel",
        layer + "SelfAttention/relative_attention_bias/embedding",
        layer + "layer_norm/weight",
    }
    assert bits_equal(tree["lm_head/kernel"], np.ascontiguousarray(tensors["lm_head.weight"].T))


def test_types_that_numpy_cannot_hold_are_copied(tmp_path):
    write_config(tmp_path / "m")
    table = {
        "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "packed": {"dtype": "F4", "shape": [2, 3], "data_offsets": [4, 7]},
    }
    text = json.dumps(table, separators=(",", ":")).encode()
    content = len(text).to_bytes(8, "little") + text + b"\0\0\0\0abc"
    (tmp_path / "m" / "model.safetensors").write_bytes(content)
    out = saved(tmp_path / "m", tmp_path, params={"w": np.ones(1, np.float32)}, dtype="bfloat16")
    written = (out / "model.safetensors").read_bytes()
    assert written.endswith(np.ones(1, ml_dtypes.bfloat16).tobytes() + b"abc")
    assert open_checkpoint(str(out)).tensors["packed"].dtype == "F4"
    with pytest.raises(CheckpointError, match="packed: has the packed element type F4"):
        load(str(out))


def test_what_lies_beside_the_weights_is_copied_and_what_is_not_ours_is_not(tmp_path):
    folder = write_safetensors(tmp_path / "m", vision_tower())
    kept = ["spiece.model", "README.md", "prompts/a.txt", "prompts/deep/b.txt", ".gitattributes"]
    left = [
        "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.ckpt.index", "rust_model.ot",
        "training_args.bin", "pytorch_model.bin.index.json", "nufilt.json", "forecast.json", "state/x.json",
        ".git/config", ".cache/x", "onnx/model.onnx", "onnx/config.json",
    ]  # fmt: skip
    for name in [*kept, *left]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "dangling.json").symlink_to("nowhere")
    out = saved(folder, tmp_path)
    assert set(folder_bytes(out)) == {*kept, "model.safetensors", "config.json", "tokenizer.json"}
    assert (out / "prompts/deep/b.txt").read_text() == "prompts/deep/b.txt"


def test_output_inside_the_base_does_not_copy_itself(tmp_path):
    folder = write_safetensors(tmp_path / "m", vision_tower())
    before = set(folder_bytes(folder))
    save({}, folder / "merged", like=str(folder))
    assert set(folder_bytes(folder / "merged")) == before


def test_every_misfit_is_named_at_once(tmp_path):
    folder = write_safetensors(tmp_path / "m", clip_model() | vision_tower())
    bad = {
        "no.such": np.zeros(1, np.float32),
        FC1: np.zeros((4, 6), np.float32),
        "logit_scale": np.asarray(3),
        "text_model.embeddings.position_ids": np.zeros((1, 7), np.float32),
    }
    with pytest.raises(CheckpointError) as caught:
        save(bad, tmp_path / "out", like=str(folder))
    lines = [str(problem) for problem in caught.value.problems]
    file = f"{folder}/model.safetensors"
    assert lines[0] == f"{folder}: no.such: has no such tensor (remove it, or choose another `like`)"
    assert lines[1].startswith(f"{file}: {FC1}: has shape [6, 4], the new value [4, 6]")
    assert lines[2].startswith(f"{file}: logit_scale: holds F32, the new value int64")
    assert lines[3].startswith(f"{file}: text_model.embeddings.position_ids: holds I64, the new value float32")
    assert len(lines) == 4 and not (tmp_path / "out").exists()


def test_torn_ties_and_lossy_integers_are_refused(tmp_path):
    tensors = t5_model(tied_copies=("encoder.embed_tokens.weight",)) | {"ids": np.zeros(2, np.int8)}
    folder = write_safetensors(tmp_path / "m", tensors, model_type="t5")
    two = {"shared.weight": np.zeros((9, 4), "f"), "encoder.embed_tokens.weight": np.ones((9, 4), "f")}
    with pytest.raises(CheckpointError, match=r"is tied to shared\.weight, but was given a value of its own"):
        save(two, tmp_path / "out", like=str(folder))
    with pytest.raises(CheckpointError, match="ids: has numbers out of the range of int8"):
        save({"ids": np.array([1, 300])}, tmp_path / "out", like=str(folder))
    assert load_file(saved(folder, tmp_path, {"ids": np.array([1, -3])}) / "model.safetensors")["ids"][1] == -3


def test_unknown_format_and_dtype_are_refused(tmp_path):
    folder = write_safetensors(tmp_path / "m", vision_tower(), model_type="llava")
    for options, message in [
        ({"format": "gguf"}, "format must be safetensors or flax, not 'gguf'"),
        ({"format": "flax"}, "is a 'llava' model, which has no Flax form"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, not 'int8'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            save({}, tmp_path / "out", like=str(folder), **options)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_an_output_in_use_is_left_alone(tmp_path):
    folder = write_safetensors(tmp_path / "m", vision_tower())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(OutputError, match="out: exists and is not an empty folder"):
        save({}, tmp_path / "out", like=str(folder))
    assert folder_bytes(tmp_path / "out") == {"mine": b"keep"}
    (tmp_path / "out" / "mine").unlink()
    save({}, tmp_path / "out", like=str(folder))  # an empty folder is free


def test_a_full_disk_leaves_nothing_and_is_one_line(tmp_path, monkeypatch):
    folder = write_safetensors(tmp_path / "m", vision_tower(), shards=3)
    calls = []

    def full(path, pieces, metadata):
        calls.append(path)
        path.write_bytes(b"half")
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nufilt_jax.checkpoints.safetensors_files.write_file", full)
    with pytest.raises(OutputError, match=r"cannot be written: No space left on device \(free some space") as caught:
        save({}, tmp_path / "out", like=str(folder))
    assert len(str(caught.value).splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_is_told_of_the_copy_and_not_of_what_is_copied(tmp_path, monkeypatch):
    folder = write_safetensors(tmp_path / "m", vision_tower())
    (folder / "tokenizer.json").write_text("{}")

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr("nufilt_jax.checkpoints.writer.shutil.copyfile", full)
    with pytest.raises(OutputError, match="cannot be written: No space left on device") as caught:
        save({}, tmp_path / "out", like=str(folder))
    assert not str(caught.value).startswith(str(folder))


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    folder = write_safetensors(tmp_path / "m", vision_tower())

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("nufilt_jax.checkpoints.writer.sync_tree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save({}, tmp_path / "out", like=str(folder))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_write_checkpoint_tells_the_weight_files(tmp_path):
    like = open_checkpoint(str(write_safetensors(tmp_path / "m", clip_model(), shards=2)), role="base")
    files = write_checkpoint({}, tmp_path / "new", like=like)
    assert [path.name for path in files] == [path.name for path in like.weight_files]
    assert all(path.parent == tmp_path / "new" for path in files)


def test_large_tensors_are_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("nufilt_jax.checkpoints.outputs._CHUNK", 5)
    monkeypatch.setattr("nufilt_jax.checkpoints.flax_files._CHUNK_BYTES", 16)
    folder = write_flax(tmp_path / "m", flax_vision_tree(vision_tower()))
    new = vision_tower(seed=4)
    out = saved(folder, tmp_path, params=new, dtype="bfloat16")
    after = load(str(out))
    tree = flatten_dict(msgpack_restore((out / "flax_model.msgpack").read_bytes()), sep="/")
    for name, value in new.items():
        assert bits_equal(np.ascontiguousarray(after[name]), value.astype(ml_dtypes.bfloat16))
    expected = new[FC1].T.astype(ml_dtypes.bfloat16)
    assert bits_equal(tree["vision_model/encoder/layers/0/mlp/fc1/kernel"], np.ascontiguousarray(expected))
