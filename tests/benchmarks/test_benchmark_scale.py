"""The script that measures 7 B shapes, at the smallest size that does something."""

import json

import pytest

from benchmarks.common import commands, records
from benchmarks.speed import scale

TINY = ("--width", "32", "--inner", "48", "--vocabulary", "8", "--blocks", "1", "2", "--tasks", "2", "--no-eager")


def test_every_size_under_one_cap_and_one_size_under_all():
    found = [(case.blocks, case.cap) for case in scale.cases((2, 4, 8), 3, ("4GB", "8GB", "16GB"))]
    assert found == [(2, "8GB"), (4, "4GB"), (4, "8GB"), (4, "16GB"), (8, "8GB")]


def test_a_point_beside_the_line_is_told():
    at, off = scale.line({1: 10.0, 2: 21.0, 3: 30.0}, 10)
    assert at == pytest.approx(10 * 10 + 1 / 3) and 1 < off < 4


def test_of_several_runs_the_fastest_counts_without_compiling(monkeypatch, tmp_path):
    def ran(wall, compiled):
        return commands.Run(wall, 0.0, 0, json.dumps({"steps": [], "compiled": {"seconds": compiled}}))

    runs = iter([ran(10.0, 1.0), ran(11.0, 4.0), ran(9.5, 1.5)])
    monkeypatch.setattr(commands, "plan", lambda *_: {})
    monkeypatch.setattr(commands, "merge", lambda *_: next(runs))
    found = scale.measured(scale.Case(1, 2, "4GB"), 3, tmp_path, commands.Version("now", tmp_path))
    assert [run.wall for run in found.runs] == [11.0, 9.5, 10.0]


def test_dividing_costs_what_it_takes_longer():
    def run(solve):
        return commands.Run(2 * solve, 0.0, 0, json.dumps({"steps": [{"timings": {"solve": solve}}]}))

    assert scale.spread_table({1: run(10.0), 4: run(11.0)})["rows"][1][2:] == [11.0, pytest.approx(10.0)]


def test_scale(monkeypatch, capsys, tmp_path):
    out = tmp_path / "scale.json"
    options = ("--max-memory", "4GB", "--devices", "2", "--whole", "4", "--json", str(out))
    monkeypatch.setattr("sys.argv", ["scale.py", *TINY, *options])
    scale.main()
    stored = json.loads(out.read_text())
    assert capsys.readouterr().out.strip() == records.markdown(stored)
    one, two = records.rows(stored, scale.SECONDS)
    assert (one["blocks"], two["blocks"], one["cap GB"]) == (1, 2, 4.0)
    parts = (*scale.READING, *scale.WRITING, "start, end", "plan", "compile", "solve")
    assert sum(one[part] for part in parts) == pytest.approx(one["wall"])
    assert {row["within the cap"] for row in records.rows(stored, scale.MEMORY)} == {"yes"}
    for row, whole in zip(records.rows(stored, scale.PER_BLOCK), (one, two), strict=True):
        solved = row["decompose"] + row["adam"] + row["fuse"]
        assert solved == pytest.approx(whole["solve"] / whole["blocks"])
    command, second = records.rows(stored, scale.LINEAR)
    assert command["4 blocks, extrapolated"] == pytest.approx(2 * (two["wall"] - two["compile"]))
    assert second["minutes"] == pytest.approx(second["4 blocks, extrapolated"] / 60)
    assert [row["devices"] for row in records.rows(stored, scale.SPREAD)] == [2]
