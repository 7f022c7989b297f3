import hashlib
import json
import os
import struct

import ml_dtypes
import msgpack
import numpy as np
import pytest
from checkpoint_builders import (
    bits_equal,
    clip_model,
    flax_vision_tree,
    t5_model,
    vision_tower,
    write_config,
    write_flax,
    write_index,
    write_safetensors,
)
from flax.serialization import msgpack_serialize
from safetensors.numpy import load_file, save_file

from nufilt_jax.checkpoints import open_checkpoint
from nufilt_jax.errors import CheckpointError

FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"


def refusals(folder, **options):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder), **options)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_every_bit(tmp_path, dtype, shards):
    tensors = clip_model(dtype=dtype)
    checkpoint = open_checkpoint(str(write_safetensors(tmp_path / "m", tensors, shards=shards)), role="base")
    read = checkpoint.read()
    assert read.keys() == tensors.keys() == checkpoint.tensors.keys()
    assert all(bits_equal(read[name], tensors[name]) for name in tensors)
    assert len(checkpoint.weight_files) == shards
    assert checkpoint.format == "safetensors" and checkpoint.revision is None


def test_read_is_a_view_of_the_file_that_cannot_be_written(tmp_path):
    checkpoint = open_checkpoint(str(write_safetensors(tmp_path / "m", vision_tower())))
    value = checkpoint.read([FC1])[FC1]
    with pytest.raises(ValueError, match="read-only"):
        value[0, 0] = 1


def test_tensor_info_speaks_of_the_file(tmp_path):
    tensors = vision_tower(prefix="")  # as transformers 5 writes CLIPVisionModel
    info = open_checkpoint(str(write_safetensors(tmp_path / "m", tensors))).tensors[FC1]
    assert info.stored_name == "encoder.layers.0.mlp.fc1.weight"
    assert (info.shape, info.dtype, info.file.name) == ((6, 4), "F32", "model.safetensors")


def test_flax_equals_torch_in_canonical_orientation(tmp_path):
    tensors = vision_tower()
    checkpoint = open_checkpoint(str(write_flax(tmp_path / "m", flax_vision_tree(tensors))), role="base")
    read = checkpoint.read()
    assert checkpoint.format == "flax" and read.keys() == tensors.keys()
    assert all(bits_equal(np.ascontiguousarray(read[name]), tensors[name]) for name in tensors)
    assert all(value.flags.aligned for value in read.values())  # the file itself aligns nothing
    assert checkpoint.tensors[FC1].stored_name == "vision_model/encoder/layers/0/mlp/fc1/kernel"
    assert checkpoint.tensors[FC1].shape == tensors[FC1].shape


def test_flax_shards(tmp_path):
    tree = flax_vision_tree(vision_tower())["vision_model"]
    folder = tmp_path / "m"
    write_config(folder)
    weight_map = {}
    for index, (part, content) in enumerate(sorted(tree.items())):
        file = f"flax_model-{index + 1:05d}-of-{len(tree):05d}.msgpack"
        (folder / file).write_bytes(msgpack_serialize({"vision_model": {part: content}}))
        stored = open_flax_names(content, f"vision_model/{part}")
        weight_map |= dict.fromkeys(stored, file)
    write_index(folder, weight_map, name="flax_model.msgpack.index.json")
    read = open_checkpoint(str(folder)).read()
    assert all(bits_equal(np.ascontiguousarray(read[n]), v) for n, v in vision_tower().items())


def open_flax_names(node, path):
    if not isinstance(node, dict):
        return [path]
    return [name for key, child in node.items() for name in open_flax_names(child, f"{path}/{key}")]


def test_flax_scalars_bfloat16_and_chunked_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr("flax.serialization.MAX_CHUNK_SIZE", 16)
    big = np.arange(60, dtype=np.float32).reshape(5, 12).astype(ml_dtypes.bfloat16)
    tree = {"a": {"embedding": big}, "logit_scale": np.float32(2.5), "b": {"bias": np.zeros(0, np.float32)}}
    read = open_checkpoint(str(write_flax(tmp_path / "m", tree))).read()
    assert bits_equal(read["a.weight"], big)
    assert read["logit_scale"] == np.float32(2.5) and read["logit_scale"].shape == ()
    assert read["b.bias"].shape == (0,)


def test_safetensors_come_before_flax_and_stale_pickles(tmp_path):
    folder = write_safetensors(tmp_path / "m", vision_tower(seed=1))
    write_flax(folder, flax_vision_tree(vision_tower(seed=2)))
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    read = open_checkpoint(str(folder)).read([FC1])
    assert bits_equal(read[FC1], vision_tower(seed=1)[FC1])


@pytest.mark.parametrize("copies", [(), ("encoder.embed_tokens.weight",), ("decoder.embed_tokens.weight",)])
def test_tied_embeddings_are_listed_once(tmp_path, copies):
    tensors = t5_model(tied_copies=copies)
    folder = write_safetensors(tmp_path / "m", tensors, model_type="t5", tie_word_embeddings=False)
    checkpoint = open_checkpoint(str(folder), role="base")
    assert set(checkpoint.tensors) == set(t5_model())
    assert [alias.name for alias in checkpoint.tensors["shared.weight"].aliases] == list(copies)


def test_an_embedding_stored_under_its_alias_alone_has_the_canonical_name(tmp_path):
    tensors = t5_model(tied_copies=("encoder.embed_tokens.weight",))
    shared = tensors.pop("shared.weight")
    checkpoint = open_checkpoint(str(write_safetensors(tmp_path / "m", tensors, model_type="t5")))
    assert bits_equal(checkpoint.read(["shared.weight"])["shared.weight"], shared)
    assert checkpoint.tensors["shared.weight"].stored_name == "encoder.embed_tokens.weight"


def test_a_head_is_tied_only_if_config_and_bytes_agree(tmp_path):
    own = t5_model()
    tied = t5_model(tied_copies=("lm_head.weight",), head=False)
    cases = [(own, True, True), (tied, False, True), (tied, True, False)]
    listed = [
        "lm_head.weight" in open_checkpoint(str(folder)).tensors
        for i, (tensors, tie, _) in enumerate(cases)
        for folder in [write_safetensors(tmp_path / f"{i}", tensors, model_type="t5", tie_word_embeddings=tie)]
    ]
    assert listed == [True, True, False]


@pytest.mark.parametrize(("config", "tied"), [({}, True), ({"tie_word_embeddings": False}, False)])
def test_a_head_is_tied_where_the_model_s_default_says_so(tmp_path, config, tied):
    tensors = {name: np.ones((3, 2), np.float32) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    write_safetensors(tmp_path / "gemma", tensors, model_type="gemma2", **config)
    assert len(open_checkpoint(str(tmp_path / "gemma")).tensors) == (1 if tied else 2)


def test_llava_spellings_are_one(tmp_path):
    four = {
        "language_model.model.layers.0.mlp.up_proj.weight": np.ones((2, 3), np.float32),
        "language_model.model.embed_tokens.weight": np.ones((5, 3), np.float32),
        "language_model.lm_head.weight": np.ones((5, 3), np.float32),
        "multi_modal_projector.linear_1.bias": np.ones(3, np.float32),
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": np.ones((2, 3), np.float32),
    }
    five = {
        "model.language_model.layers.0.mlp.up_proj.weight": ("language_model.model.layers.0.mlp.up_proj.weight"),
        "model.language_model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
        "lm_head.weight": "language_model.lm_head.weight",
        "model.multi_modal_projector.linear_1.bias": "multi_modal_projector.linear_1.bias",
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight": (
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
        ),
    }
    mixed = {n.replace("vision_model.", ""): v for n, v in four.items()}  # what 5.x saves to disk
    spelled = [four, {new: four[old] for new, old in five.items()}, mixed]
    for index, tensors in enumerate(spelled):
        folder = write_safetensors(tmp_path / str(index), tensors, model_type="llava")
        assert set(open_checkpoint(str(folder)).tensors) == set(four)


def test_text_model_of_transformers_5(tmp_path):
    tensors = {
        "embeddings.token_embedding.weight": np.ones((3, 2), np.float32),
        "encoder.layers.0.mlp.fc1.weight": np.ones((2, 2), np.float32),
        "final_layer_norm.weight": np.ones(2, np.float32),
    }
    names = set(open_checkpoint(str(write_safetensors(tmp_path / "m", tensors))).tensors)
    assert names == {f"text_model.{name}" for name in tensors}


OLD_AND_NEW = [
    ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
    ("encoder.pos_conv_embed.conv.parametrizations.weight.original0", "encoder.pos_conv_embed.conv.weight_g"),
    ("encoder.pos_conv_embed.conv.parametrizations.weight.original1", "encoder.pos_conv_embed.conv.weight_v"),
]


@pytest.mark.parametrize(("one", "other"), OLD_AND_NEW)
def test_norms_have_names_of_two_times_that_are_one(tmp_path, one, other):
    for index, name in enumerate((one, other)):
        model = open_checkpoint(str(write_safetensors(tmp_path / str(index), {name: np.ones(2, "f")})))
        assert [(info.name, info.stored_name) for info in model.tensors.values()] == [(other, name)]
    [line] = refusals(write_safetensors(tmp_path / "both", {one: np.ones(2, "f"), other: np.ones(2, "f")}))
    assert "means the same tensor as " in line


@pytest.mark.parametrize(
    "name", ["stages.0.layers.0.layer_scale.gamma", "blocks.0.gamma", "myLayerNorm.gamma", "norm.beta"]
)
def test_a_gamma_of_no_layer_norm_has_a_name_of_its_own(tmp_path, name):
    assert [*open_checkpoint(str(write_safetensors(tmp_path / "m", {name: np.ones(2, "f")}))).tensors] == [name]


def test_two_spellings_of_one_tensor_are_refused(tmp_path):
    tensors = {
        "multi_modal_projector.x": np.ones(1, np.float32),
        "lm_head.weight": np.ones((1, 1), np.float32),
    }
    tensors["language_model.lm_head.weight"] = tensors["lm_head.weight"]
    [line] = refusals(write_safetensors(tmp_path / "m", tensors))
    assert "lm_head.weight: means the same tensor as " in line


def test_sha256_is_of_the_files(tmp_path):
    folder = write_safetensors(tmp_path / "m", vision_tower(), shards=2)
    digests = open_checkpoint(str(folder)).sha256()
    for name, digest in digests.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert len(digests) == 2


def header(table, data=b"", length=None):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 605157884\n"
_MARK = "__msgpack_chunked_array__"
CHUNKED = b"\x82" + msgpack.packb(_MARK) + b"\xc3" + b"\xa6chunks"  # the beginning of an array in chunks
ONE = msgpack.ExtType(1, msgpack.packb([[1], "float32", b"1234"]))


def packed(*parts):
    """Keys and values of a map, one after another."""
    return b"".join(map(msgpack.packb, parts))


def row(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "model.safetensors: is 0 bytes long, too short"),
        (header({}, length=10**12), "model.safetensors: is no safetensors file: it would have a header of"),
        (
            header({}, length=500),
            "model.safetensors: is cut off: the header needs 508 bytes, the file has 10",
        ),
        (header(b"{nonsense"), "model.safetensors: has a header that is not JSON"),
        (header(b"\xff\xfe\xff"), "model.safetensors: has a header that is not JSON"),
        (header([1]), "model.safetensors: has a header that is not a JSON object"),
        (header({"w": 3}), "w: has no description in the header"),
        (header({"w": row([1], 0, 4, "Q3")}, b"1234"), "w: has the unknown element type 'Q3'"),
        (header({"w": row([-1], 0, 4)}, b"1234"), "w: has the impossible shape [-1]"),
        (header({"w": row([True], 0, 4)}, b"1234"), "w: has the impossible shape [True]"),
        (header({"w": row([1], 4, 0)}, b"1234"), "w: has the impossible place [4, 0] in the file"),
        (header({"w": row([2], 0, 4)}, b"1234"), "w: takes 4 bytes, but F32 of shape [2] needs 8"),
        (header({"w": row([2], 0, 8)}, b"1234"), "w: is cut off: it ends at byte"),
        (header({"a": row([1], 0, 4), "w": row([1], 2, 6)}, b"123456"), "w: overlaps the tensor before it"),
        (header({"a": row([1], 0, 4), "w": row([1], 6, 10)}, b"1" * 10), "w: leaves a hole before it"),
        (header({"w": row([1], 0, 4)}, b"1" * 9), "model.safetensors: has 5 bytes after its last tensor"),
        (header({}), "model.safetensors: holds no tensors"),
        (header(b" " * 64), "model.safetensors: has a header that is not JSON"),
        (header(b'{"w":' + b"[" * 200_000), "model.safetensors: has a header that is nested too deeply"),
        (header(b'{"w":' * 150 + b"1" + b"}" * 150), "model.safetensors: has a header that is nested too deeply"),
        (header(b'{"w":' + b"9" * 400 + b"}"), "model.safetensors: has a header that has a number of 400 digits"),
        (header(b'{"w":NaN}'), "model.safetensors: has a header that has the number NaN"),
        (header(b'{"w":1e999}'), "model.safetensors: has a header that has the number 1e999"),
        (header(b'{"w":1,"w":2}'), "model.safetensors: has a header that has the key 'w' twice"),
        (header({"w": row([10**300], 0, 4)}, b"1234"), "w: has the impossible shape [1000"),
        (header({"w": row([1] * 40, 0, 4)}, b"1234"), "w: has the impossible shape [1, 1"),
        (header({"w": row([0, 1 << 40, 1 << 40], 0, 0)}), "w: has the impossible shape [0, 1099511627776"),
        (header({"\ud800": row([1], 0, 4)}, b"1234"), "has a name that is no text"),
        (LFS_POINTER, "is a Git LFS pointer, not the file itself (run in the clone: git lfs pull)"),
    ],
    ids=lambda value: value.split(": ", 1)[-1][:30] if isinstance(value, str) else "",
)
def test_broken_safetensors_are_named(tmp_path, content, expected):
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    [line] = refusals(tmp_path)
    assert line.startswith(f"{tmp_path}/model.safetensors: ") and expected in line


def test_every_truncation_of_a_flax_file_is_refused(tmp_path):
    folder = write_flax(tmp_path / "m", {"a": {"kernel": np.ones((2, 3), np.float32)}, "b": np.float32(1)})
    whole = (folder / "flax_model.msgpack").read_bytes()
    for length in range(len(whole)):
        (folder / "flax_model.msgpack").write_bytes(whole[:length])
        [line] = refusals(folder)
        cut = ("is cut off: byte ", "is cut off: it ends at byte ", "is cut off: a shape has ")
        assert line.startswith(f"{folder}/flax_model.msgpack: ") and any(what in line for what in cut)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x80extra", "has 5 bytes after its last tensor"),
        (b"\x81\xa1w\x93\x01\x02\x03", "w: is a msgpack array, not an array or a map of arrays"),
        (b"\x81\xa1w\xc7\x01\x2apickle", "w: is an object of type 42 that is no array"),
        (b"\x81\x05\xc0", "has a msgpack int where a name belongs"),
        (msgpack_serialize({"w": np.ones(2, np.complex128)}), "w: has the unknown element type 'complex128'"),
        (
            msgpack_serialize({"w": np.ones(2, np.float32)}).replace(b"\x91\x02", b"\x91\x03"),
            "w: takes 8 bytes",
        ),
        (b"\x81\xa1w" * 100, "is nested too deeply"),
        (CHUNKED * 50_000, "is nested too deeply"),
        (CHUNKED.replace(b"\xa6chunks", b"\xa5shape\xdd\xff\xff\xff\xff"), "a shape has 4294967295 numbers"),
        (
            b"\x81\xa1w\x83" + packed(_MARK, True, "shape", {"0": 1}, "chunks", {"9" * 5000: ONE}),
            "chunks without numbers",
        ),
        (b"\x81\xa1w\x83" + packed(_MARK, True, "shape", [1 << 63] * 2, "chunks", {"0": ONE}), "w: has the impossible"),
        (b"\x82" + packed("w", ONE, "w/v", ONE), "w: is an array and a map of arrays"),
        (LFS_POINTER, "is a Git LFS pointer, not the file itself (run in the clone: git lfs pull)"),
        (b"\x80", "holds no tensors"),
    ],
)
def test_broken_flax_files_are_named(tmp_path, content, expected):
    write_config(tmp_path)
    (tmp_path / "flax_model.msgpack").write_bytes(content)
    [line] = refusals(tmp_path)
    assert line.startswith(f"{tmp_path}/flax_model.msgpack: ") and expected in line


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "a/../../b", "C:\\x", "", 3, "a\0b"])
def test_index_paths_out_of_the_folder_are_refused(tmp_path, shard):
    write_config(tmp_path)
    write_index(tmp_path, {"w": shard})
    [line] = refusals(tmp_path)
    assert line.startswith(f"{tmp_path}/model.safetensors.index.json: w: is said to be in {shard!r}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "is no index"),
        ('{"weight_map": 3}', "is no index"),
        ('{"weight_map": {}, "weight_map": {}}', "has the key 'weight_map' twice"),
        ("\udcff", "is not JSON"),
    ],
)
def test_a_broken_index_is_refused(tmp_path, text, expected):
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    [line] = refusals(tmp_path)
    assert line.startswith(f"{tmp_path}/model.safetensors.index.json: {expected}")


def test_all_faults_of_a_folder_come_at_once(tmp_path):
    folder = write_safetensors(tmp_path / "m", vision_tower(), shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    one, two, three = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    lost = next(name for name, file in index.items() if file == one)
    index["ghost"] = one
    index[lost] = two  # in the first shard still, but the index says the second
    write_index(folder, index)
    (folder / three).unlink()
    (folder / "config.json").write_text("{")
    lines = refusals(folder, role="base")
    assert any(line.startswith(f"{folder}/config.json: is not JSON") for line in lines)
    assert any(line.startswith(f"{folder}/{three}: is missing; the index puts 3 tensors") for line in lines)
    assert any(line.startswith(f"{folder}/{one}: ghost: is missing") for line in lines)
    assert any(line.startswith(f"{folder}/{two}: {lost}: is missing") for line in lines)
    assert len(lines) == 4


def test_shards_and_index_must_agree(tmp_path):
    folder = write_safetensors(tmp_path / "m", vision_tower(), shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    del index[FC1]
    write_index(folder, index)
    [line] = refusals(folder)
    assert f"{FC1}: is not in model.safetensors.index.json" in line

    duplicate = load_file(folder / "model-00001-of-00002.safetensors")
    write_safetensors(folder, duplicate | load_file(folder / "model-00002-of-00002.safetensors"), shards=2)
    both = vision_tower()
    index = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(both))}
    save_file(vision_tower(seed=1), folder / "model-00002-of-00002.safetensors")
    write_index(folder, index)
    lines = refusals(folder)
    assert len(lines) == 5 and all("is stored a second time; it is in model-00001" in line for line in lines)


def test_equal_copies_in_two_shards_and_buffers_in_no_index_are_accepted(tmp_path):
    tensors, buffer = vision_tower(), "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = write_safetensors(tmp_path / "m", tensors, shards=2)
    second = folder / "model-00002-of-00002.safetensors"
    copy = {name: tensors[name] for name in [sorted(tensors)[0]]}
    save_file(load_file(second) | copy | {buffer: np.ones(2, "f")}, second)
    model = open_checkpoint(str(folder))
    assert model.tensors.keys() == tensors.keys() | {buffer}
    assert all(bits_equal(value, tensors[name]) for name, value in model.read(tensors).items())
    save_file(load_file(second) | {"further.weight": np.ones(2, "f")}, second)
    [line] = refusals(folder)
    assert "further.weight: is not in model.safetensors.index.json" in line


def test_links_as_the_hub_cache_makes_them_are_followed(tmp_path):
    blobs = write_safetensors(tmp_path / "blobs", vision_tower(), shards=2)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    assert len(open_checkpoint(str(snapshot), role="base").read()) == 10


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "weights.pth", "a.pkl"])
def test_a_pickle_alone_is_refused_with_reason_and_remedy(tmp_path, name):
    write_config(tmp_path)
    (tmp_path / name).write_bytes(b"cos\nsystem\n")
    [line] = refusals(tmp_path)
    assert line.startswith(f"{tmp_path}/{name}: is a pickle, which can run any code when loaded")
    assert "call save_pretrained(folder), which writes safetensors" in line  # in 4.35 and later, and in 5


def test_adapters_and_folders_without_weights_are_refused(tmp_path):
    (tmp_path / "tf_model.h5").write_bytes(b"")
    assert "holds tf_model.h5, but neither model.safetensors nor" in refusals(tmp_path)[0]
    (tmp_path / "tf_model.h5").unlink()
    assert f"{tmp_path}: holds no weights" in refusals(tmp_path)[0]
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    [line] = refusals(tmp_path)
    assert "is a PEFT adapter, no model" in line and "--task NAME=FOLDER" in line


@pytest.mark.parametrize("text", ["", "[1]", "{", None])
def test_a_broken_config_is_refused_in_a_base_only(tmp_path, text):
    folder = write_safetensors(tmp_path / "m", vision_tower())
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    assert open_checkpoint(str(folder)).config == {}
    [line] = refusals(folder, role="base")
    assert "config.json" in line


def test_paths_that_are_no_folders(tmp_path):
    folder = write_safetensors(tmp_path / "m", vision_tower())
    assert f"is a file (give its folder: {folder})" in refusals(folder / "model.safetensors")[0]
    assert refusals("./nowhere")[0].startswith("./nowhere: there is no such folder")
    assert "is a local folder, which has no revision 'main'" in refusals(folder, revision="main")[0]


def test_unknown_names_are_refused_on_reading(tmp_path):
    checkpoint = open_checkpoint(str(write_safetensors(tmp_path / "m", vision_tower())))
    with pytest.raises(CheckpointError, match=r"no\.such: is not in this checkpoint"):
        checkpoint.read([FC1, "no.such"])


def test_a_flax_model_in_a_safetensors_file_is_refused(tmp_path):
    import numpy as np

    (tmp_path / "config.json").write_text("{}")
    save_file({"a.kernel": np.zeros((2, 3), np.float32)}, tmp_path / "model.safetensors", metadata={"format": "flax"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: holds a Flax model in a safetensors file"):
        open_checkpoint(str(tmp_path))
