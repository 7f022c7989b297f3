"""The script that measures memory, at the smallest size that does something."""

import json

import pytest

from benchmarks.common import commands, models, records
from benchmarks.speed import memory

TINY = ("--width", "32", "--inner", "48", "--blocks", "1", "--vocabulary", "64")


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["memory.py", *map(str, arguments)])
    memory.main()


def test_memory(monkeypatch, capsys, tmp_path):
    out = tmp_path / "memory.json"
    case = ("--methods", "sum", "--tasks", "1", "--max-memory", "4GB", "10MB", "--cold")
    call(monkeypatch, *TINY, *case, "--folder", tmp_path / "models", "--json", out)
    stored = json.loads(out.read_text())
    assert capsys.readouterr().out.strip() == records.markdown(stored)
    assert str(tmp_path) not in out.read_text()
    free, capped = records.rows(stored, memory.TITLE)
    model = models.Llama(32, 48, 1, 64)
    for row, cap in ((free, None), (capped, 4.0)):
        assert (row["method"], row["tasks"], row["cap GB"], row["wanted at most"]) == ("sum", 1, cap, 3.0)
        assert row["times the model in float32"] == pytest.approx(1e9 * row["peak GB"] / model.n_bytes)
        assert 0.05 < row["peak GB"] < 4 and row["seconds"] > 0
        assert row["planned / peak"] == pytest.approx(row["planned GB"] / row["peak GB"])
    assert stored["about"]["model"]["parameters"] == model.n_bytes / 4
    assert stored["about"]["compile cache"] == "cold"
    large, small = records.rows(stored, memory.CAPPED)
    assert (large["within the cap"], large["windows"], large["case"]) == ("yes", 1, "sum, 1 tasks")
    assert large["slower by %"] == pytest.approx(100 * (capped["seconds"] / free["seconds"] - 1))
    assert (small["within the cap"], small["peak GB"]) == ("refused", None)
    assert [row["cap GB"] for row in records.rows(stored, memory.ESTIMATE)] == [None, 4.0]
    kept = {path.name for path in (tmp_path / "models").iterdir()}
    assert kept >= {"base", "task00"} and "out" not in kept


def test_the_compile_cache_is_filled_once_for_each_method_and_cap(monkeypatch, tmp_path):
    merged = []

    def merge(folder, options, version):
        merged.append((options.count("--task"), "--max-memory" in options, "--steps" in options))
        return "run"

    monkeypatch.setattr(commands, "plan", lambda *arguments: {})
    monkeypatch.setattr(commands, "merge", merge)
    cases = memory._cases(["nufilt"], [3, 4], ["4GB"])
    found = memory.measure_all(cases, tmp_path, commands.versions(None)[0], 5, cold=False)
    assert list(found) == cases and all(one.run == "run" for one in found.values())
    free, capped = [(2, False, True), (3, False, True)], [(2, True, True), (3, True, True)]
    assert merged == [*free, *capped, (4, False, True), (4, True, True)]


def test_a_merge_that_fails_says_why(tmp_path):
    for name, task in (("base", None), ("task00", 0)):
        models.write_model(tmp_path / name, models.Llama(8, 8, 1, 8), task)
    (tmp_path / "base" / "config.json").write_text("{")
    [version] = commands.versions(None)
    with pytest.raises(SystemExit, match=r"--method sum .*ended with status 1: nufilt: .*config\.json"):
        memory.measured(memory.Case("sum", 1, None), tmp_path, version, None, "keep")
