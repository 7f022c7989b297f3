"""Files as strangers, broken disks and careless tools make them: a checkpoint, or a refusal in words."""

import json

import msgpack
import numpy as np
import pytest
from checkpoint_builders import flax_vision_tree, vision_tower, write_flax, write_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from nufilt_jax.checkpoints import flax_files, open_checkpoint, save
from nufilt_jax.errors import CheckpointError, OutputError
from nufilt_jax.output.place import read_json, write_json

MANY = settings(max_examples=100, deadline=None, database=None)
NUMBERS = st.one_of(st.integers(-2, 70), st.sampled_from([2**31, 2**63, 2**64, 10**30, 10**400]), st.floats())
TEXTS = st.one_of(st.sampled_from(["F32", "BF16", "F4", "w", "w.weight", "w/kernel", "\ud800", "x" * 300]), st.text())
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)
ROWS = st.fixed_dictionaries(
    {
        "dtype": TEXTS,
        "shape": st.one_of(st.lists(NUMBERS, max_size=4), VALUES),
        "data_offsets": st.one_of(st.lists(NUMBERS, max_size=2), VALUES),
    }
)
HEADERS = st.one_of(VALUES, st.dictionaries(TEXTS, st.one_of(ROWS, VALUES), max_size=3))


def opened(folder):
    """Whether a folder is a checkpoint that can be read and written again; what is not must be refused in words."""
    try:
        checkpoint = open_checkpoint(str(folder), role="base")
        params = checkpoint.read(n for n, info in checkpoint.tensors.items() if info.dtype in ("F32", "BF16"))
        save(params, folder.with_name("again"), like=str(folder))
    except CheckpointError as error:
        assert all("\n" not in str(problem) and len(str(problem)) < 1000 for problem in error.problems)
        return False
    return True


def mutated(data, cuts):
    """The bytes with some pieces replaced."""
    for at, piece in cuts:
        at = at % (len(data) + 1)
        data = data[:at] + piece + data[at + len(piece) :]
    return data


CUTS = st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(max_size=5)), max_size=4)


@MANY
@given(
    header=st.one_of(VALUES, st.dictionaries(TEXTS, st.one_of(ROWS, VALUES), max_size=3)), body=st.binary(max_size=64)
)
def test_any_header(tmp_path_factory, header, body):
    folder = write_safetensors(tmp_path_factory.mktemp("m") / "model", vision_tower())
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    opened(folder)


@MANY
@given(cuts=CUTS)
def test_any_damage_to_a_safetensors_file(tmp_path_factory, cuts):
    folder = write_safetensors(tmp_path_factory.mktemp("m") / "model", vision_tower())
    path = folder / "model.safetensors"
    path.write_bytes(mutated(path.read_bytes(), cuts))
    opened(folder)


@MANY
@given(cuts=CUTS)
def test_any_damage_to_a_flax_file(tmp_path_factory, cuts):
    folder = write_flax(tmp_path_factory.mktemp("m") / "model", flax_vision_tree(vision_tower()))
    path = folder / "flax_model.msgpack"
    path.write_bytes(mutated(path.read_bytes(), cuts))
    opened(folder)


@MANY
@given(data=st.binary(max_size=40))
def test_any_flax_file(tmp_path_factory, data):
    folder = write_flax(tmp_path_factory.mktemp("m") / "model", {"w": np.ones(1, np.float32)})
    (folder / "flax_model.msgpack").write_bytes(data)
    opened(folder)


@MANY
@given(config=st.one_of(VALUES, st.dictionaries(st.sampled_from(["model_type", "text_config", "dtype"]), VALUES)))
def test_any_config(tmp_path_factory, config):
    folder = write_safetensors(tmp_path_factory.mktemp("m") / "model", vision_tower())
    (folder / "config.json").write_text(json.dumps(config))
    assert opened(folder) == (isinstance(config, dict) and str(10**400) not in json.dumps(config))


@MANY
@given(index=st.one_of(VALUES, st.fixed_dictionaries({"metadata": VALUES, "weight_map": VALUES})))
def test_any_index(tmp_path_factory, index):
    folder = write_safetensors(tmp_path_factory.mktemp("m") / "model", vision_tower(), shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not opened(folder)


@pytest.mark.parametrize("opening", [b'{"a":', b'{"a":[', b"["])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_brackets_without_end(tmp_path, name, opening):
    folder = write_safetensors(tmp_path / "m", vision_tower(), shards=2)
    (folder / name).write_bytes(opening * 200_000)
    with pytest.raises(CheckpointError, match=f"{name}: is nested too deeply"):
        open_checkpoint(str(folder), role="base")


def test_a_config_may_say_infinity(tmp_path):
    folder = write_safetensors(tmp_path / "m", vision_tower())
    (folder / "config.json").write_text('{"time_step_limit": [0.0, Infinity], "time_step_limit": [1.0, Infinity]}')
    assert open_checkpoint(str(folder), role="base").config == {"time_step_limit": [1.0, float("inf")]}


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, name):
    folder = write_safetensors(tmp_path / "m", vision_tower(), shards=2)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(CheckpointError, match=rf"{name}: is a Git LFS pointer, .* \(run in the clone: git lfs pull\)"):
        open_checkpoint(str(folder), role="base")


def test_metadata_that_the_format_forbids_is_left_out(tmp_path):
    header = (
        b'{"__metadata__":{"format":"pt","n":3,"\\ud800":"x"},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    folder = write_safetensors(tmp_path / "m", vision_tower())
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    assert open_checkpoint(str(folder)).metadata == {"model.safetensors": {"format": "pt"}}


def test_a_recipe_tells_of_paths_that_are_no_text(tmp_path):
    path = tmp_path / "nufilt.json"
    write_json(path, {"source": "mod\udce8le 模型"})
    assert read_json(path) == {"source": "mod\udce8le 模型"}
    assert "模型".encode() in path.read_bytes() and rb"mod\udce8le" in path.read_bytes()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"seconds": NaN}', "has the number NaN"),
        ('{"a":' * 200_000, "is nested too deeply"),
        ("", "is not JSON: Expecting value"),
        ("3", "is not a JSON object"),
        ('{"seed": ' + "1" * 5000 + "}", "has a number of 5000 digits"),
    ],
    ids=["constant", "deep", "empty", "number", "digits"],
)
def test_a_damaged_recipe_is_refused(tmp_path, text, what):
    (tmp_path / "nufilt.json").write_text(text)
    with pytest.raises(OutputError, match=f"nufilt.json: {what}"):
        read_json(tmp_path / "nufilt.json")


def test_halves_of_characters_in_a_config_are_written_again(tmp_path):
    folder = write_safetensors(tmp_path / "m", vision_tower())
    (folder / "config.json").write_text('{"torch_dtype": "float32", "name": "\\ud800"}')
    save(open_checkpoint(str(folder)).read(), tmp_path / "out", like=str(folder), dtype="float16")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "float16", "name": "\ud800"}


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint64"])
def test_a_flax_shape_in_any_whole_numbers(tmp_path, dtype):
    width, code = {"int8": (1, 0xD0), "int16": (2, 0xD1), "int32": (4, 0xD2), "int64": (8, 0xD3), "uint64": (8, 0xCF)}[
        dtype
    ]
    folder = write_flax(tmp_path / "m", {"w": np.ones((2, 3), np.float32)})
    path = folder / "flax_model.msgpack"
    data = path.read_bytes()
    at = data.index(b"\x92\x02\x03")  # the shape [2, 3]
    start = data.index(b"\xc7")  # the array, an extension of so many bytes
    shape = b"\x92" + bytes([code]) + (2).to_bytes(width, "big") + bytes([code]) + (3).to_bytes(width, "big")
    longer = data[start + 1] + len(shape) - 3
    path.write_bytes(data[: start + 1] + bytes([longer]) + data[start + 2 : at] + shape + data[at + 3 :])
    assert open_checkpoint(str(folder)).tensors["w"].shape == (2, 3)
    minus = bytes([code]) + (256**width - 2).to_bytes(width, "big")
    path.write_bytes(path.read_bytes().replace(bytes([code]) + (2).to_bytes(width, "big"), minus))
    with pytest.raises(CheckpointError, match=r"w: has the impossible shape"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (b'{"a":' + b"[" * 3_000_000, "is JSON of more than 2500000 values"),
        (b'{"a":"' + b"x" * 47_999_000 + b'"}', "has no description in the header"),
        (b"x" * 48_000_001, "it would have a header of 48000001 bytes"),
        (b'{"w":' + b"[" * 5000 + b"]" * 5000 + b"}", "is nested too deeply"),
        (b'{"w":{"shape":' + b"[" * 900 + b"]" * 900 + b"}}", "is nested too deeply"),
    ],
    ids=["brackets", "long text", "long", "nested", "nested shape"],
)
def test_a_small_file_cannot_take_much_memory(tmp_path, header, what):
    folder = write_safetensors(tmp_path / "m", vision_tower())
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(str(folder))
    assert what in str(error.value) and len(str(error.value)) < 1000


def test_a_config_without_end_is_not_read_to_it(tmp_path):
    folder = write_safetensors(tmp_path / "m", vision_tower())
    with (folder / "config.json").open("r+b") as file:
        file.truncate(1 << 40)  # a sparse file
    with pytest.raises(CheckpointError, match=r"config\.json: is JSON of more than 48 MB"):
        open_checkpoint(str(folder), role="base")


def array(shape=(2,), dtype="float32", n_bytes=8):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, b"\0" * n_bytes)))


CUT_SHAPE = msgpack.ExtType(1, b"\x93\xdd" + (2**31).to_bytes(4, "big"))
CHUNKED = "__msgpack_chunked_array__"
NOT_FLAX = {
    "twice": ({"a": {"b": array()}, "a/b": array()}, "holds two tensors of one name"),
    "pair": ({"w": msgpack.ExtType(1, msgpack.packb((1, 2)))}, "w: is not described as an array"),
    "endless shape": ({"w": CUT_SHAPE}, f"is cut off: a shape has {2**31} numbers"),
    "bytes": ({"w": array(n_bytes=9)}, r"w: takes \d+ bytes, which float32 of shape \[2\] does not"),
    "no mark": ({"w": {CHUNKED: None, "shape": {}, "chunks": {}}}, "has a chunked array without its mark"),
    "no text": ({b"\xff\xfe": array()}, "has a name that is not UTF-8"),
    "no numbers": ({"w": {CHUNKED: True, "shape": {"0": 2}, "chunks": {"x": array()}}}, "has chunks without numbers"),
    "other part": ({"w": {CHUNKED: True, "shape": {"0": 2}, "size": 1}}, "w: has the unknown part 'size'"),
    "few chunks": (
        {"w": {CHUNKED: True, "shape": {"0": 5}, "chunks": {"0": array()}}},
        r"w: has chunks that do not add up to its shape \[5\]",
    ),
}


@pytest.mark.parametrize("name", NOT_FLAX)
def test_what_flax_does_not_write(tmp_path, name):
    tree, what = NOT_FLAX[name]
    folder = write_flax(tmp_path / "m", {"w": np.ones(1, np.float32)})
    (folder / "flax_model.msgpack").write_bytes(msgpack.packb(tree))
    with pytest.raises(CheckpointError, match=what):
        open_checkpoint(str(folder))


def test_more_tensors_than_any_model_has(tmp_path, monkeypatch):
    folder = write_flax(tmp_path / "m", {"v": np.ones(1, np.float32), "w": np.ones(1, np.float32)})
    monkeypatch.setattr(flax_files, "_MOST_TENSORS", 1)
    with pytest.raises(CheckpointError, match="holds more than 1 tensors"):
        open_checkpoint(str(folder))


def test_a_header_of_damage_is_not_told_to_its_end(tmp_path):
    folder = write_safetensors(tmp_path / "m", vision_tower())
    header = json.dumps({f"w{n}": {} for n in range(5000)}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(str(folder))
    told, rest = str(error.value).splitlines()
    assert "w0 and 999 more: has the unknown element type None" in told
    assert "has damage in more than 1000 tensors; 4000 were not looked into" in rest


def test_an_overlap_tells_both_places(tmp_path):
    folder = write_safetensors(tmp_path / "m", vision_tower())
    rows = {name: {"dtype": "F32", "shape": [1], "data_offsets": [at, at + 4]} for name, at in (("v", 0), ("w", 2))}
    header = json.dumps(rows).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"123456")
    start = 8 + len(header)
    with pytest.raises(CheckpointError, match=f"w: overlaps the tensor before it: it starts at byte {start + 2}, not"):
        open_checkpoint(str(folder))


def test_an_index_without_a_map(tmp_path):
    folder = write_safetensors(tmp_path / "m", vision_tower(), shards=2)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is no index: expected JSON with a weight_map"):
        open_checkpoint(str(folder))
