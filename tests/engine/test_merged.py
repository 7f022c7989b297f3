"""The merged model, tensor by tensor: what writing it keeps in memory."""

import itertools
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from nufilt_jax import methods
from nufilt_jax.checkpoints import open_checkpoint, outputs, write_checkpoint
from nufilt_jax.checkpoints.tensors import PassingTensors
from nufilt_jax.engine import merged
from nufilt_jax.engine.merged import MergedTensor, merged_tensors
from nufilt_jax.linalg.factored import Factored
from nufilt_jax.methods.state import merged_tensor


@pytest.mark.parametrize("shape", [(), (3,), (7, 5), (2, 3, 2, 2), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("room", [1, 48, 1 << 24])
def test_a_tensor_made_by_rows_has_every_bit(monkeypatch, shape, dtype, room):
    monkeypatch.setattr(merged, "_ROWS_BYTES", room)
    rng = np.random.default_rng(0)
    base, delta = rng.standard_normal(shape).astype(dtype), np.asarray(rng.standard_normal(shape), np.float32)
    wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    tensor = MergedTensor("x", base, {"x": delta})
    expected = np.asarray(merged_tensor(base, delta, wide))
    assert (tensor.shape, tensor.dtype) == (shape, wide)
    for found in (tensor.made(), np.asarray(tensor)):
        assert found.dtype == wide and found.shape == shape and found.tobytes() == expected.tobytes()


def test_one_tensor_at_a_time_is_made(shared_models, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(str(shared_models / "base"), role="base")
    rule = methods.get("sum")
    task = {name: x + np.float32(0.5) for name, x in checkpoint.read().items()}
    state = rule.update(rule.init(checkpoint.read()), task)
    log = []
    make, write = MergedTensor.made, outputs.cast

    def made(self):
        log.append("made")
        return make(self)

    def written(*args):
        log.append("written")
        return write(*args)

    monkeypatch.setattr(MergedTensor, "made", made)
    monkeypatch.setattr(outputs, "cast", written)
    write_checkpoint(
        merged_tensors({name: state.base[name] for name in state.touched}, state.delta.on_host()),
        tmp_path / "out",
        like=checkpoint,
        dtype="bfloat16",
    )
    assert log.count("made") == len(state.delta)
    assert all(then == "written" for now, then in itertools.pairwise(log) if now == "made")


def test_mapped_tensors_that_pass_are_those_that_were_mapped(shared_models):
    mapped = open_checkpoint(str(shared_models / "base")).read()
    passing = PassingTensors(mapped)
    assert list(passing) == list(mapped) and len(passing) == len(mapped)
    copies = {name: np.array(x) for name, x in passing.items()}
    assert all(copies[name].tobytes() == x.tobytes() for name, x in mapped.items())


def test_pages_of_a_tensor_that_has_passed_are_gone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({name: np.ones((1024, 1024), np.float32) for name in "abcd"}, tmp_path / "model.safetensors")
    passing = PassingTensors(open_checkpoint(str(tmp_path)).read())
    for name in passing:
        passing[name].sum()
        assert _resident(tmp_path / "model.safetensors") < 6 << 20
    assert _resident(tmp_path / "model.safetensors") > 3 << 20


def _resident(path):
    """Bytes of a mapped file that are in this process's memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.endswith(str(path)))
    return next(int(line.split()[1]) << 10 for line in lines[at:] if line.startswith("Rss:"))


def test_pages_of_a_tensor_that_is_made_are_gone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({name: np.ones((1024, 1024), np.float32) for name in "abcd"}, tmp_path / "model.safetensors")
    base = open_checkpoint(str(tmp_path)).read()
    for tensor in merged_tensors(base, {name: np.zeros((1024, 1024), np.float32) for name in base}).values():
        tensor.made()
        assert _resident(tmp_path / "model.safetensors") < 1 << 20


@pytest.mark.parametrize("kind", ["dense", "factored"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_large_tensor_is_rounded_by_a_program(monkeypatch, kind, dtype):
    """To the bits that numpy gives; in parts of the same number of rows where there can be some."""
    monkeypatch.setattr(merged, "_LARGE", 1)
    monkeypatch.setattr(merged, "_ROWS_BYTES", 5 * 4 * 6)
    rng = np.random.default_rng(0)
    base = rng.standard_normal((12, 6)).astype(np.float16).astype(dtype)
    basis, rows = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((12, 2), (2, 6)))
    delta = Factored(basis, rows) if kind == "factored" else basis @ rows
    tensor = MergedTensor("x", base, {"x": delta})
    parts = list(tensor.in_parts(np.dtype(dtype)))
    assert [len(part) for part, _ in parts] == [4, 4, 4] and not any(is_lost for _, is_lost in parts)
    expected = merged_tensor(base, basis @ rows, np.dtype(dtype))
    assert np.concatenate([part for part, _ in parts]).tobytes() == np.asarray(expected).tobytes()


def test_a_program_tells_of_numbers_out_of_range(monkeypatch):
    monkeypatch.setattr(merged, "_LARGE", 1)
    base = np.array([[65504.0, 1.0]], np.float32)
    for added, is_lost in ((0.0, False), (15.0, False), (16.0, True), (np.inf, False)):
        tensor = MergedTensor("x", base, {"x": np.array([[added, 0.0]], np.float32)})
        assert [lost for _, lost in tensor.in_parts(np.dtype(np.float16))] == [is_lost]


def test_what_no_program_rounds(monkeypatch):
    monkeypatch.setattr(merged, "_LARGE", 4)
    small, wide, cube = (np.zeros(shape, dtype) for shape, dtype in (((1, 3), "f4"), ((2, 2), "f8"), ((2, 2, 2), "f4")))
    for base in (small, wide, cube):
        assert MergedTensor("x", base, {"x": np.zeros(base.shape, np.float32)}).in_parts(np.dtype(np.float32)) is None
    monkeypatch.setattr(merged, "_cpu", lambda: None)
    fits = MergedTensor("x", np.zeros((2, 2), np.float32), {"x": np.zeros((2, 2), np.float32)})
    assert fits.in_parts(np.dtype(np.float32)) is None


def test_parts_have_as_many_rows_as_divide_them():
    assert [merged._divisor(n, most) for n, most in ((4096, 1024), (11008, 1024), (4096, 381), (7, 3), (5, 9))] == [
        1024,
        688,
        256,
        1,
        5,
    ]
    assert merged._divisor(8191, 100) == 100
