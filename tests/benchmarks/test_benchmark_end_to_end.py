"""The benchmark of the whole command, at a tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.speed import end_to_end

REPOSITORY = Path(__file__).parents[2]
MODULE = "benchmarks.speed.end_to_end"


def test_the_models_have_the_true_size_of_a_vision_tower():
    tower = end_to_end.Tower()
    assert tower.n_bytes == 4 * 87_456_000  # CLIP ViT-B/32's, position_ids apart
    assert len(tower.shapes()) == 199


def test_models_are_the_same_whenever_they_are_written(tmp_path):
    tower = end_to_end.Tower(width=32, blocks=1)
    for folder, task in (("base", None), ("task", 1), ("again", 1), ("other", 2)):
        end_to_end.write_model(tmp_path / folder, tower, task)
    base, task, again, other = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "task", "again", "other")
    )
    assert {name: x.shape for name, x in base.items()} == tower.shapes()
    for name, x in base.items():
        np.testing.assert_array_equal(task[name], again[name])
        assert not np.array_equal(task[name], other[name])
        assert 0 < np.abs(task[name] - x).max() < 0.1


def test_a_line_is_drawn_through_the_times():
    table = end_to_end._growth({8: 18.0, 14: 30.0, 20: 42.0})
    assert [row[0] for row in table["rows"]] == [8, 14, 20, "per task"]
    assert table["rows"][-1][1] == pytest.approx(2)
    assert all(abs(row[3]) < 1e-6 for row in table["rows"][:-1])


def test_the_command_runs_and_its_times_add_up(tmp_path):
    options = ("--tasks", "2", "--width", "64", "--blocks", "1", "--cold", "--json", str(tmp_path / "results.json"))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run([sys.executable, "-m", MODULE, *options], capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    seconds, hidden = document["tables"]
    row = dict(zip(seconds["columns"], seconds["rows"][0], strict=True))
    parts = list(row.values())[2 : seconds["columns"].index("not solving, %")]
    assert sum(parts) == pytest.approx(row["wall"])
    assert min(parts) >= 0 and 0 < row["peak GiB"] < row["limit GiB"]
    assert dict(zip(hidden["columns"], hidden["rows"][0], strict=True))["compiled anew"] > 0
    assert seconds["title"] in run.stdout
