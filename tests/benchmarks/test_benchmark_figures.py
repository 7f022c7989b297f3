"""The figures on two of the smallest built-in models."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
import scipy.stats

from benchmarks.common import records, streams
from benchmarks.study import figures, forecast_check, study_settings
from benchmarks.study.rank_sweep import Ranks
from nufilt_jax import NufiltConfig, methods, zoo
from nufilt_jax.evaluation import evaluate_tasks
from nufilt_jax.presets import shuffled

SMALL = dataclasses.replace(zoo.TINY_FAMILY, name="small", tasks=("letters", "shapes"))
IMAGES = 16


@pytest.fixture(autouse=True)
def small_study(tmp_path, monkeypatch):
    monkeypatch.setenv("NUFILT_CACHE", str(tmp_path))
    shutil.copytree(zoo.store.weights_folder(zoo.TINY_FAMILY), tmp_path / "small" / "weights")
    monkeypatch.setattr(figures, "StudyStream", functools.partial(streams.StudyStream, SMALL))
    monkeypatch.setattr(forecast_check, "StudyStream", functools.partial(streams.StudyStream, SMALL))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script; returns the results file's content and the names of the pictures."""

    def call(number, *options):
        out = tmp_path / "out" / f"figure_{number}.json"
        argv = ("--figure", number, "--images", IMAGES, "--json", out, *options)
        monkeypatch.setattr("sys.argv", ["figures.py", *map(str, argv)])
        figures.main()
        pictures = sorted(path.name.removeprefix(out.stem + "_") for path in out.parent.glob("*.png"))
        return json.loads(out.read_text()), pictures

    return call


def by_hand(ranks, order):
    """ACC and BWT in percent of one setting, merged alone."""
    names = shuffled(SMALL.tasks, order)
    tasks = {task.name: task for task in zoo.evaluation_tasks(names, n_images=IMAGES)}
    rule = methods.get("nufilt", NufiltConfig(**ranks._asdict(), decomposition="svd"))
    state, rows = rule.init(zoo.load_params("base")), []
    for name in names:
        state = rule.update(state, zoo.load_params(name))
        merged = {key: np.asarray(x) for key, x in state.merged.items()}
        rows.append([evaluate_tasks(merged, SMALL.config, [tasks[name]])[name] for name in names])
    (first, _), last = rows
    return 100 * np.mean(last), 100 * (last[0] - first)


def test_rank_sensitivity(run, monkeypatch):
    curves = {"filter_rank": (Ranks(0, 0, 0), Ranks(24, 0, 0)), "task_rank": (Ranks(24, 6, 8),)}
    monkeypatch.setattr(figures, "figure_4", lambda width: curves if width == 128 else None)
    document, pictures = run(4, "--orders", 1, 3)
    assert pictures == ["ranks.png"]
    titles = ["Fig. 4, small: r_p (r_l = 0, r_v = 0)", "Fig. 4, small: r_v (r_p = 24, r_l = 6)"]
    assert [table["title"] for table in document["tables"]] == titles
    for title, settings in zip(titles, curves.values(), strict=True):
        for row, ranks in zip(records.rows(document, title), settings, strict=True):
            wanted = np.mean([by_hand(ranks, order) for order in (1, 3)], axis=0)
            # An image whose two best classes are nearly alike may fall to the other one.
            np.testing.assert_allclose([row["ACC %"], row["BWT %"]], wanted, atol=100 / IMAGES)
    assert [row["rank"] for row in records.rows(document, titles[0])] == [0, 24]


def test_affinities(run):
    document, pictures = run(2)
    assert pictures == ["attention.png", "distribution.png", "mlp.png", "whole_model.png"]
    rows = records.rows(document, "Fig. 2, small: mean affinity")
    assert [row["layers"] for row in rows] == ["whole model", "attention", "MLP"]
    for row in rows:
        assert 1 > row["own task"] > row["other tasks"] > row["random subspaces"] == pytest.approx(1 / 6, abs=0.01)


def test_losses(run, monkeypatch):
    kept = ("sum", "weight_average", "wemoe", "adamerging")
    published = study_settings.published
    monkeypatch.setattr(study_settings, "published", lambda width: {label: published(width)[label] for label in kept})
    document, pictures = run(5)
    assert pictures == ["losses.png"]
    found = {row["method"]: row for row in records.rows(document, f"Fig. 5, small: mean over steps, {figures.UNIT}")}
    assert tuple(found) == kept[:2]  # the others need data
    # The mean of two models gives each half of what the sum adds, and takes half of the first away.
    assert found["weight_average"]["stability"] < found["sum"]["stability"]
    assert found["weight_average"]["plasticity"] < found["sum"]["plasticity"]


def test_the_forecast_against_measurements(tmp_path, monkeypatch):
    out = tmp_path / "forecast.json"
    argv = ("forecast_check.py", "--orders", 1, 2, 3, "--images", IMAGES, "--json", out)
    monkeypatch.setattr("sys.argv", list(map(str, argv)))
    forecast_check.main()
    [table] = json.loads(out.read_text())["tables"]
    found = {tuple(row[:2]): row[2:] for row in table["rows"]}
    assert set(found) == {
        (label, words) for label in forecast_check.ROWS for words in forecast_check.FORECASTS.values()
    }
    stream = forecast_check.StudyStream(n_images=IMAGES)
    setting = study_settings.published(128)["nufilt"]
    merges = [forecast_check.check(stream, setting, order) for order in (1, 2, 3)]
    told = np.array([merge.told["drift"][1].mean() for merge in merges])  # of two tasks, one step has a forecast
    lost = np.array([merge.lost[1] for merge in merges])
    _, by_step = found["nufilt", "drift on kept directions, share of ‖D V₂‖²"]
    wanted = scipy.stats.spearmanr(told, lost).statistic if np.ptp(lost) else None
    assert by_step == pytest.approx(wanted)
    assert all(-1 <= by_layer <= 1 for by_layer, _ in found.values())
