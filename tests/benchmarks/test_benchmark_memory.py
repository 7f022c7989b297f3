"""The script that measures memory, at the smallest size that does something."""

import json

import pytest

from benchmarks.common import records
from benchmarks.speed import memory


def test_memory(monkeypatch, capsys, tmp_path):
    out = tmp_path / "memory.json"
    size = ("--width", "32", "--inner", "48", "--blocks", "1", "--vocabulary", "64")
    argv = ["memory.py", *size, "--methods", "sum", "--tasks", "1", "--folder", tmp_path / "models", "--json", out]
    monkeypatch.setattr("sys.argv", [str(part) for part in argv])
    memory.main()
    stored = json.loads(out.read_text())
    assert capsys.readouterr().out.strip() == records.markdown(stored)
    [row] = records.rows(stored, memory.TITLE)
    model = memory.Llama(32, 48, 1, 64)
    assert (row["method"], row["tasks"]) == ("sum", 1)
    assert row["times the model in float32"] == pytest.approx(1e9 * row["peak GB"] / model.n_bytes)
    assert 0.05 < row["peak GB"] < 5
    assert model.n_bytes == 4 * (64 * 32 + 4 * 32 * 32 + 3 * 48 * 32 + 2 * 32)
    weights = (tmp_path / "models" / "base" / "model.safetensors").stat().st_size
    assert model.n_bytes / 2 < weights < model.n_bytes
    assert {path.name for path in (tmp_path / "models").iterdir()} >= {"base", "task0"}
    assert not (tmp_path / "models" / "out").exists()


def test_a_merge_that_fails_says_why(tmp_path):
    for index in (None, 0):
        memory.write_model(tmp_path / ("base" if index is None else "task0"), memory.Llama(8, 8, 1, 8), index)
    (tmp_path / "base" / "config.json").write_text("{")
    with pytest.raises(SystemExit, match=r"sum ended with status 1: nufilt: .*config\.json"):
        memory.peak(tmp_path, "sum", 1)
