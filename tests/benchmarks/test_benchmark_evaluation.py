"""The throughput benchmark at the smallest sizes, with and without something to compare with."""

import json
import re
import sys
import types

import datasets
import jax.numpy as jnp
import numpy as np
import pytest

import nufilt_jax as nj
from benchmarks.common import records
from benchmarks.common.models import Tower
from benchmarks.speed import evaluation

SMALL = ("--images", 4, "--batches", 2, 4, "--repeats", 2, "--blocks", 1, "--width", 64)


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """What the script sets in it is put back at the end."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", None)
    yield
    datasets.enable_progress_bars()


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["evaluation.py", *map(str, arguments)])
    evaluation.main()


def test_help_explains_every_option(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, "--help")
    told = capsys.readouterr().out
    for option in re.findall(r"^  (--[a-z-]+)", told, re.MULTILINE):
        assert re.search(rf"^  {option}\b.*\s{{2,}}\w|^  {option}\b.*\n\s{{10,}}\w", told, re.MULTILINE), option


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--images", 4, "--batches", 3], 2, "argument --batches: 4 images do not make whole batches of 3"),
        (["--against", "jax"], 2, "argument --against: invalid choice: 'jax' (choose from"),
        (["--against", "torch"], 1, "--against: PyTorch is not installed (pip install torch)"),
    ],
)
def test_wrong_usage_is_one_line(arguments, code, message, monkeypatch, capsys):
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, *arguments)
    told = capsys.readouterr().err
    assert left.value.code == code
    assert told.startswith(f"evaluation.py: {message}") and told.count("\n") == 1


def test_alone(monkeypatch, capsys, tmp_path):
    call(monkeypatch, *SMALL, "--json", tmp_path / "out.json")
    stored = json.loads((tmp_path / "out.json").read_text())
    assert capsys.readouterr().out.strip() == records.markdown(stored)
    assert stored["environment"]["versions"]["datasets"] == datasets.__version__
    rows = records.rows(stored, evaluation.MEMORY)
    assert [(row["contender"], row["batch"]) for row in rows] == [("nufilt_jax", 2), ("nufilt_jax", 4)]
    for row in rows:
        seconds = stored["seconds"]["memory"]["nufilt_jax"][str(row["batch"])]
        assert row["median images/s"] == pytest.approx(4 / np.median(seconds))
        assert row["best images/s"] == pytest.approx(4 / min(seconds))
    [row] = records.rows(stored, evaluation.JPEG)
    assert 0 <= row["accuracy"] <= 1
    assert len(stored["tables"]) == 2


def test_beside_another(monkeypatch, tmp_path):
    class Model:
        """Ours again, but for one feature."""

        def __init__(self, config, params):
            self.config, self.params = config, params
            assert config == Tower(width=64, blocks=1).config()

        def features(self, pixels, batch):
            found = np.array(nj.models.clip_image_features(self.params, jnp.asarray(pixels), self.config))
            found[1, 3] += 0.5 * np.abs(found).max()
            return found

        def accuracy(self, folder, head, batch):
            assert batch in (2, 4)
            assert head.shape == (10, 64)
            assert len(datasets.load_dataset(str(folder), split="test")) == 4
            return 0.75

    monkeypatch.setitem(sys.modules, "benchmarks.speed.torch_vision", types.SimpleNamespace(Model=Model))
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(evaluation, "from_jpeg", lambda *_: evaluation.timed(lambda: 0.5, 2))
    call(monkeypatch, "--against", "torch", *SMALL, "--json", tmp_path / "out.json")
    stored = json.loads((tmp_path / "out.json").read_text())
    names = [(row["contender"], row["batch"]) for row in records.rows(stored, evaluation.MEMORY)]
    assert names == [(name, batch) for batch in (2, 4) for name in (evaluation.OURS, evaluation.THEIRS)]
    assert [row["accuracy"] for row in records.rows(stored, evaluation.JPEG)] == [0.5, 0.75]
    memory, files = records.rows(stored, evaluation.RATIO)
    seconds = {name: min(map(np.median, one.values())) for name, one in stored["seconds"]["memory"].items()}
    assert memory["images/s"] == pytest.approx(seconds[evaluation.THEIRS] / seconds[evaluation.OURS])
    assert 0.3 < memory["largest difference"] < 0.6
    assert files["largest difference"] == 0.25
