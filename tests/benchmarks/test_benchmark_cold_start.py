"""The script that measures the first wait, at the smallest size, beside a version that merges nothing."""

import json

import pytest

from benchmarks.common import commands, models, records
from benchmarks.speed import cold_start


def test_cold_start(stub, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(cold_start.MODELS, "vit-b32", models.Tower(width=32, blocks=1))
    monkeypatch.delitem(cold_start.STARTED, "import, and touch solve_stack")  # slow; below it is tried with the other
    out = tmp_path / "cold_start.json"
    argv = ["cold_start.py", "--cases", "vit-b32", "--before", stub, "--folder", tmp_path / "kept", "--json", out]
    monkeypatch.setattr("sys.argv", [str(part) for part in argv])
    cold_start.main()
    stored = json.loads(out.read_text())
    assert capsys.readouterr().out.strip() == records.markdown(stored)
    assert str(tmp_path) not in out.read_text() and str(records.ROOT) not in out.read_text()
    before, now = stored["about"]["versions"]
    rows = records.rows(stored, cold_start.WAITED)
    order = [(row["version"], row["cache"]) for row in rows]
    assert order == [(before, "empty"), (before, "full"), (now, "empty"), (now, "full")]
    empty, full = rows[2:]
    assert empty["compiled anew"] == empty["programs"] > 0 == full["compiled anew"]
    for row in (empty, full):
        assert 0 < row["first task s"] + row["second task s"] < row["wall s"]
        assert 0 < row["compile s"] < row["wall s"] and row["processor s"] > 0
    assert rows[0]["first task s"] == 3.0  # as the other version tells
    started = records.rows(stored, cold_start.START)
    assert [row["version"] for row in started] == [before, now]
    assert all(row[what] > 0 for row in started for what in cold_start.STARTED)
    estimates = records.rows(stored, cold_start.ESTIMATE)
    assert [row["cache"] for row in estimates] == ["empty", "full"]
    for row in estimates:
        assert row["planned / peak"] == pytest.approx(row["planned GB"] / row["peak GB"])
        assert row["merging s planned"] is not None and row["files s measured"] > 0


def test_what_needs_no_model_is_measured(stub, tmp_path):
    table = cold_start.started(tmp_path, [commands.Version("old", stub)], repeat=2)
    [[name, *seconds]] = table["rows"]
    assert name == "old" and len(seconds) == len(cold_start.STARTED) == 3
    assert all(0 < x < 5 for x in seconds)


def test_the_study_makes_its_models_before_it_is_measured(stub, tmp_path):
    version = commands.Version("old", stub)
    cold_start.prepare("tiny", tmp_path / "tiny", [version])
    xla = commands.cache_of(tmp_path / "tiny", version) / "xla"
    xla.mkdir(parents=True)
    pair = cold_start.run_pair("tiny", tmp_path / "tiny", version)
    assert not xla.exists()
    rows = cold_start.rows("tiny", version, [pair, pair])
    assert [row[:3] for row in rows] == [["tiny", "old", "empty"], ["tiny", "old", "full"]]
    [empty, full] = cold_start.estimated("tiny", {"memory": {"planned": 2 * pair.empty.peak}}, [pair])
    assert empty[-1] == 2 and set(empty[2:-3]) == {None}
    assert len(empty) == len(full) == len(commands.ESTIMATED) + 5


def test_the_cases_have_the_sizes_of_their_models():
    sizes = {case: round(models.n_parameters(model) / 1e6) for case, model in cold_start.MODELS.items()}
    assert sizes == {"vit-b32": 87, "vit-l14": 303, "llama-7b-block": 203}
