"""The benchmark of the whole command, at a tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import commands, records
from benchmarks.speed import end_to_end

REPOSITORY = Path(__file__).parents[2]
MODULE = "benchmarks.speed.end_to_end"


def test_a_line_is_drawn_through_the_times():
    table = end_to_end._growth({8: 18.0, 14: 30.0, 20: 42.0})
    assert [row[0] for row in table["rows"]] == [8, 14, 20, "per task"]
    assert table["rows"][-1][1] == pytest.approx(2)
    assert all(abs(row[3]) < 1e-6 for row in table["rows"][:-1])


def test_two_versions_stand_beside_each_other():
    def run(wall, solve):
        return commands.Run(wall, 0.0, 0, json.dumps({"steps": [{"timings": {"solve": solve}}]}))

    table = end_to_end.compared({8: run(20.0, 10.0)}, {8: run(10.0, 4.0)})
    assert table["rows"] == [[8, 20.0, 10.0, 0.5, 10.0, 4.0, 0.4]]
    assert len(table["columns"]) == 7


def test_the_command_runs_and_its_times_add_up(stub, tmp_path):
    results = tmp_path / "results.json"
    size = ("--tasks", "2", "--width", "64", "--blocks", "1")
    options = (*size, "--cold", "--before", str(stub), "--json", str(results))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run([sys.executable, "-m", MODULE, *options], capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    document = json.loads(results.read_text())
    assert str(stub) not in results.read_text()
    seconds, hidden, *_ = document["tables"]
    row = dict(zip(seconds["columns"], seconds["rows"][0], strict=True))
    parts = list(row.values())[2 : seconds["columns"].index("not solving, %")]
    assert sum(parts) == pytest.approx(row["wall"])
    assert min(parts) >= 0 and 0 < row["peak GiB"] < row["limit GiB"]
    assert dict(zip(hidden["columns"], hidden["rows"][0], strict=True))["compiled anew"] > 0
    assert seconds["title"] in run.stdout
    [estimate] = records.rows(document, end_to_end.ESTIMATE)
    assert estimate["files s measured"] + estimate["merging s measured"] + row["compile"] == pytest.approx(row["wall"])
    assert estimate["merging s measured"] == row["solve"] and estimate["compiling s planned"] > 0
    [pair] = records.rows(document, end_to_end.COMPARED)
    assert (pair["wall now"], pair["solve now"]) == (row["wall"], row["solve"])
    assert pair["solve before"] == 4.0 and pair["solve now / before"] == row["solve"] / 4
