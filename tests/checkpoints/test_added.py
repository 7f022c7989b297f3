import errno

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_builders import HIDDEN, WIDTH, bits_equal, folder_bytes, vision_tower, write_safetensors
from safetensors.numpy import load_file, save_file

from nufilt_jax.checkpoints import fit, load, open_checkpoint, read_added, save, write_added, write_checkpoint
from nufilt_jax.checkpoints.beside import is_wanted_of_task
from nufilt_jax.errors import CheckpointError, OutputError

FILE = "added_parameters.safetensors"
MLP = "vision_model.encoder.layers.0.mlp"
GATE, BIAS = f"{MLP}.gate.weight", f"{MLP}.gate.bias"
A, B = f"{MLP}.fc1.experts.0.a", f"{MLP}.fc1.experts.0.b"


def mixture(rank=3):
    rng = np.random.default_rng(5)
    shapes = {GATE: (2, WIDTH), BIAS: (2,)}
    for i in range(2):
        for part, (m, n) in {"fc1": (HIDDEN, WIDTH), "fc2": (WIDTH, HIDDEN)}.items():
            shapes |= {f"{MLP}.{part}.experts.{i}.a": (rank, n), f"{MLP}.{part}.experts.{i}.b": (m, rank)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path):
    """A model with experts."""
    path = write_safetensors(tmp_path / "m", vision_tower())
    write_added(path, mixture())
    return path


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        load(str(folder))
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("rank", [0, 3])
def test_round_trip_in_every_bit(tmp_path, rank):
    path = write_safetensors(tmp_path / "m", vision_tower())
    before = folder_bytes(path)
    assert read_added(path) == {}
    added = {name: jnp.asarray(x) for name, x in mixture(rank).items()}
    assert write_added(path, added) == path / FILE
    assert set(folder_bytes(path)) == {*before, FILE}
    found = read_added(path)
    assert all(bits_equal(found[name], x) for name, x in mixture(rank).items()) and found.keys() == added.keys()
    whole = load(str(path))
    assert whole.keys() == vision_tower().keys() | added.keys()
    assert all(bits_equal(whole[name], x) for name, x in (vision_tower() | mixture(rank)).items())


def test_the_file_is_ordinary_safetensors(folder):
    found = load_file(folder / FILE)
    assert all(bits_equal(found[name], x) for name, x in mixture().items())


def test_other_types_and_orders_in_memory_are_written_as_float32(folder):
    added = mixture() | {A: np.asfortranarray(mixture()[A]), B: mixture()[B].astype(ml_dtypes.bfloat16)}
    write_added(folder, added)  # in the place of the first
    found = read_added(folder)
    np.testing.assert_array_equal(found[A], mixture()[A])
    np.testing.assert_array_equal(found[B], added[B].astype(np.float32))
    assert {x.dtype for x in found.values()} == {np.dtype(np.float32)}


def test_a_full_disk_leaves_what_was_there(folder, monkeypatch):
    before = folder_bytes(folder)

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nufilt_jax.checkpoints.safetensors_files.write_file", full)
    with pytest.raises(OutputError, match=f"{FILE}: cannot be written: No space left on device"):
        write_added(folder, {A: np.zeros((1, WIDTH), np.float32)})
    assert folder_bytes(folder) == before


def test_a_model_and_what_was_added_are_saved_together(tmp_path):
    base = write_safetensors(tmp_path / "base", vision_tower(), shards=2)
    params = vision_tower(seed=4) | mixture()
    for format in ("safetensors", "flax"):
        out = tmp_path / format
        save(params, out, like=str(base), format=format, dtype="bfloat16")
        found = load(str(out))
        assert found.keys() == params.keys()
        assert all(bits_equal(found[name], x) for name, x in mixture().items())
    assert "experts" not in (tmp_path / "safetensors" / "model.safetensors.index.json").read_text()


def test_a_mixture_is_saved_like_itself(folder, tmp_path):
    for number, params in enumerate((load(str(folder)), {})):
        save(params, tmp_path / f"out{number}", like=str(folder))
        assert folder_bytes(tmp_path / f"out{number}") == folder_bytes(folder)
    save({BIAS: np.ones(2, np.float32)}, tmp_path / "new", like=str(folder))
    assert read_added(tmp_path / "new")[BIAS].tolist() == [1, 1]


def test_no_writer_copies_a_stale_file(folder, tmp_path):
    write_checkpoint({}, tmp_path / "out", like=open_checkpoint(str(folder)))
    assert FILE not in folder_bytes(tmp_path / "out")


def test_neither_base_nor_task_may_be_a_mixture(folder, tmp_path):
    mixed = open_checkpoint(str(folder))
    plain = open_checkpoint(str(write_safetensors(tmp_path / "p", vision_tower())))
    assert [p.where for p in fit(plain, plain, ()).problems] == []
    for pair in ((plain, mixed), (mixed, plain)):
        [problem] = fit(*pair, ()).problems
        assert problem.where == str(folder) and "has weights that are mixed anew for every batch" in str(problem)
        assert "these cannot be merged (continue that merge with --add" in str(problem)


def test_the_hub_gives_it_too():
    assert is_wanted_of_task(FILE)
    assert not is_wanted_of_task(f"sub/{FILE}") and not is_wanted_of_task("other.safetensors")


def test_names_of_the_model_itself_are_refused(tmp_path):
    path = write_safetensors(tmp_path / "m", vision_tower() | {BIAS: np.zeros(2, np.float32)})
    write_added(path, mixture())
    [line] = refusal(path)
    assert line.startswith(f"{path / FILE}: {BIAS}: is in the model's own weights too")
    # `save` knows the tensor as the model's own, and writes it there.
    (path / FILE).unlink()
    save({BIAS: np.ones(2, np.float32)}, tmp_path / "out", like=str(path))
    assert load(str(tmp_path / "out"))[BIAS].tolist() == [1, 1] and not (tmp_path / "out" / FILE).exists()


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({A: np.zeros((3, HIDDEN), np.float32)}, (A, B)),  # another width
        ({B: np.zeros((HIDDEN, 2), np.float32)}, (A, B)),  # another rank than its partner's
        ({B: None}, (A,)),
        ({A: np.zeros(3, np.float32)}, (A, B)),
    ],
    ids=["width", "rank", "alone", "vector"],
)
def test_factors_that_do_not_fit_are_refused(folder, tmp_path, change, lost):
    added = {name: x for name, x in (mixture() | change).items() if x is not None}
    write_added(folder, added)
    lines = refusal(folder)
    assert len(lines) == len(lost)
    for name, line in zip(lost, lines, strict=True):
        shape = [*added[name].shape]
        assert line.startswith(f"{folder / FILE}: {name}: has shape {shape}; with its partner it does not make up")
    base = write_safetensors(tmp_path / "base", vision_tower())
    with pytest.raises(CheckpointError, match=r"params: .*does not make up"):
        save(vision_tower() | added, tmp_path / "out", like=str(base))
    assert not (tmp_path / "out").exists()


def test_an_expert_of_no_matrix_is_refused(folder):
    stem = f"{MLP}.fc3.experts.0"
    pair = {f"{stem}.a": np.zeros((2, WIDTH), np.float32), f"{stem}.b": np.zeros((HIDDEN, 2), np.float32)}
    write_added(folder, mixture() | pair)
    assert all("and fits no matrix" in line for line in refusal(folder))


def test_damage_is_refused(folder):
    path = folder / FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    assert all("is cut off" in line for line in refusal(folder))
    path.write_bytes(b"junk")
    [line] = refusal(folder)
    assert "too short for a safetensors file" in line
    save_file({A: mixture()[A].astype(np.float16), "other.weight": np.zeros(2, np.float32)}, path)
    lines = refusal(folder)
    assert [line.split(": ")[1] for line in sorted(lines)] == sorted(["other.weight", A])
    assert all("is no gate or expert in float32" in line for line in lines)
