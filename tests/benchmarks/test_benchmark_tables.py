"""The tables on a study of two tasks and next to no training, and the paper's numbers beside them."""

import dataclasses
import functools
import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

import nufilt_jax as nj
from benchmarks.common import paper_tables, records, streams
from benchmarks.study import fine_tuning, study_levers, study_settings, tables
from nufilt_jax import zoo
from nufilt_jax.errors import ConfigError
from nufilt_jax.evaluation import evaluate_tasks
from nufilt_jax.presets import shuffled
from nufilt_jax.zoo.draws import HARD
from nufilt_jax.zoo.families import Phase
from nufilt_jax.zoo.train import build

SHORT = Phase(steps=50, batch=4, learning_rate=2e-3, weight_decay=0.0, n_images=32)
SMALL = dataclasses.replace(
    zoo.TINY_FAMILY, name="small", tasks=("hue", "gaps", "count"), looks=HARD, pretrain=SHORT, finetune=SHORT
)


@pytest.fixture(scope="module", autouse=True)
def small_study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUFILT_CACHE", str(folder))
        patch.setattr(tables, "STUDY", SMALL)
        patch.setattr(tables, "StudyStream", functools.partial(streams.StudyStream, SMALL))
        patch.setattr(study_settings, "StudyStream", functools.partial(streams.StudyStream, SMALL))
        with jax.numpy_dtype_promotion("standard"):
            build(SMALL, folder / "small" / "weights", Console(file=io.StringIO()))
        yield


@pytest.fixture
def chosen(monkeypatch, tmp_path):
    """A choice by validation that differs from the published settings."""
    monkeypatch.setattr(study_settings, "RESULTS", tmp_path / "settings.json")
    call(study_settings, monkeypatch, "--rows", "task_arithmetic", "--images", 16)
    return study_settings.chosen(128)


def call(script, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main()


def plain_scores(method, config, order):
    """ACC and BWT in percent on 16 test images per task, written down from their definitions."""
    names = shuffled(SMALL.tasks, order)
    drawn = zoo.evaluation_tasks(names, n_images=16, family=SMALL)
    rule = nj.methods.get(method, config)
    state, first = rule.init(zoo.load_params("base", SMALL)), {}
    for name in names:
        state = rule.update(state, zoo.load_params(name, SMALL))
        last = evaluate_tasks({k: np.asarray(v) for k, v in state.merged.items()}, SMALL.config, drawn)
        first[name] = last[name]
    changes = [last[name] - first[name] for name in names[:-1]]
    return 100 * np.mean(list(last.values())), 100 * np.mean(changes)


def test_the_ablation(chosen, monkeypatch, capsys, tmp_path):
    out = tmp_path / "study.json"
    arguments = ("--table", 4, "--orders", 1, 2, "--images", 16, "--json", out)
    call(tables, monkeypatch, *arguments)
    printed, document = capsys.readouterr().out, json.loads(out.read_text())
    [table] = document["tables"]
    assert table["title"] == "Table 4: the ablation; small, 3 tasks, 2 orders"
    assert "| sum |" in printed
    rows = {row[0]: row[1:] for row in table["rows"]}
    assert set(rows) == {"pre-trained", "individual", *tables.ABLATION}
    expected = np.array([plain_scores("sum", None, order) for order in (1, 2)])
    means, spreads = expected.mean(axis=0), expected.std(axis=0, ddof=1)
    wanted = [f"{mean:.1f} ± {spread:.1f}" for mean, spread in zip(means, spreads, strict=True)]
    assert rows["sum"] == [*wanted, *wanted, "62.1 ± 0.0", "-18.5 ± 6.2"]
    assert rows["nufilt"][-2:] == ["83.6 ± 0.2", "-2.7 ± 0.7"]
    # Once more, nothing is merged, and another table of the same runs stands beside the first.
    monkeypatch.setattr(tables, "merge", None)
    call(tables, monkeypatch, *arguments)
    assert json.loads(out.read_text())["tables"] == document["tables"]


def test_overhead(monkeypatch, tmp_path):
    monkeypatch.setitem(tables.LABELS, 5, ("task_arithmetic", "nufilt"))
    out = tmp_path / "study.json"
    call(tables, monkeypatch, "--table", 5, "--orders", 3, "--images", 16, "--json", out)
    [table] = json.loads(out.read_text())["tables"]
    ours = [row for row in table["rows"] if row[-1] == "here"]
    assert [row[:2] for row in ours] == [
        ["task_arithmetic", None],
        ["nufilt", 50],
        ["nufilt, 25 steps", 25],
        ["nufilt, 100 steps", 100],
    ]
    assert all(row[2] > 0 for row in ours)
    size = sum(value.size for value in zoo.load_params("base", SMALL).values())
    assert ours[0][3] == pytest.approx(size / 1e6)
    assert next(row for row in table["rows"] if row[:2] == ["NUFILT", 50])[2:5] == [138.9, 87.5, "83.6 ± 0.2"]


def test_every_task(chosen, monkeypatch, tmp_path):
    monkeypatch.setitem(tables.LABELS, 10, ("task_arithmetic", "adamerging"))
    out = tmp_path / "study.json"
    call(tables, monkeypatch, "--table", 10, "--orders", 1, "--images", 16, "--json", out)
    first, second, theirs = json.loads(out.read_text())["tables"]
    assert first["columns"] == second["columns"] == ["method", *SMALL.tasks, "ACC"]
    runs = json.loads(out.read_text())["runs"]
    [run] = [run for run in runs if run["config"] == dataclasses.asdict(chosen["task_arithmetic"].config)]
    [row] = [row for row in second["rows"] if row[0] == "task_arithmetic"]
    assert row[1:-1] == [round(100 * run["scores"]["test"]["at_the_end"][name], 1) for name in SMALL.tasks]
    assert "adamerging" in [row[0] for row in first["rows"]]
    [row] = [row for row in theirs["rows"] if row[0] == "opcm"]
    assert row[theirs["columns"].index("MNIST")] == paper_tables.per_task("ViT-B/32")["opcm", "MNIST"]


def test_runs_of_something_else_are_not_mixed_in(chosen, monkeypatch, tmp_path):
    out = tmp_path / "study.json"
    call(tables, monkeypatch, "--table", 4, "--orders", 1, "--images", 16, "--json", out)
    with pytest.raises(SystemExit, match="holds runs of"):
        call(tables, monkeypatch, "--table", 4, "--orders", 1, "--images", 17, "--json", out)


def test_settings_are_chosen_on_the_validation_draw(monkeypatch, tmp_path):
    looked = []

    def listening(self, params, names, split="test"):
        looked.append(split)
        # Scale 0.5 is made the best one.
        change = np.abs(params["vision_model.encoder.layers.0.mlp.fc1.weight"] - self.model("base")[key]).sum()
        return dict.fromkeys(names, 1 - abs(float(change) - wanted))

    key = "vision_model.encoder.layers.0.mlp.fc1.weight"
    stream = streams.StudyStream(SMALL, n_images=16)
    tasks = [stream.model(name)[key] - stream.model("base")[key] for name in SMALL.tasks]
    wanted = float(np.abs(0.5 * np.sum(tasks, axis=0)).sum())
    monkeypatch.setattr(streams.StudyStream, "scores", listening)
    out = tmp_path / "settings.json"
    call(study_settings, monkeypatch, "--rows", "task_arithmetic", "--images", 16, "--json", out)
    assert set(looked) == {"val"}
    assert json.loads(out.read_text())["chosen"]["task_arithmetic"]["config"]["scale"] == 0.5


def test_published_ranks_follow_the_width():
    rows = study_settings.published(256)
    nufilt = rows["nufilt"].config
    assert (nufilt.filter_rank, nufilt.adapter_rank, nufilt.task_rank) == (43, 21, 3)
    assert rows[study_settings.CLOSED_FORM].config == dataclasses.replace(nufilt, solver="closed_form")
    assert rows["null_space"].config.filter_rank == 43
    assert study_settings.published(768)["nufilt"].config == nj.NufiltConfig()


def test_the_study_has_no_flan_t5(monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        call(tables, monkeypatch, "--table", 2)
    assert left.value.code == 2
    assert "say --on paper" in capsys.readouterr().err


class FakeTask:
    def __init__(self, name):
        self.name = name

    def score(self, params):
        return float(params["vision_model.encoder.layers.0.mlp.fc1.weight"].mean())


def test_the_papers_checkpoints(monkeypatch, tmp_path):
    """With folders of this machine in the place of the Hub's."""
    folders = zoo.materialise(tmp_path / "tiny")
    preset = streams.Preset(str(folders.base), tuple((n, str(p)) for n, p in folders.tasks.items()), {})
    monkeypatch.setattr(streams, "clip_preset", lambda *_: preset)
    opened = []
    suite = type("Suite", (), {"tasks": [FakeTask(name) for name in folders.tasks]})
    monkeypatch.setattr(streams, "open_suite", lambda names, base, options: opened.append(names) or suite)
    stream = streams.PaperStream("vit-b32", 8)
    assert opened == [tuple(folders.tasks)]
    assert stream.name == "paper_vit-b32_8"
    assert stream.tasks == zoo.TASK_NAMES
    for name in ("base", "digits"):
        for key, value in zoo.load_params(name).items():
            np.testing.assert_array_equal(stream.model(name)[key], value)
    assert list(stream.scores(stream.model("base"), ["letters"])) == ["letters"]
    with pytest.raises(ConfigError, match="has no 'val' draw"):
        stream.scores(stream.model("base"), ["letters"], "val")
    with pytest.raises(ConfigError, match="data is missing"):
        stream.examples("letters", None, 1)


def test_the_levers_start_from_what_the_package_does(chosen, monkeypatch, tmp_path):
    monkeypatch.setattr(study_levers, "StudyStream", functools.partial(streams.StudyStream, SMALL))
    levers = {"as chosen": study_levers.Lever(), "more": study_levers.Lever(with_fc2=True, other_params="average")}
    monkeypatch.setattr(study_levers, "LEVERS", levers)
    out = tmp_path / "levers.json"
    call(study_levers, monkeypatch, "--images", 64, "--json", out)
    package, ours, more = records.rows(json.loads(out.read_text()), "The closed form on the study's validation draw")
    assert ours["ACC %"] == pytest.approx(package["ACC %"], abs=1)  # rounding may move an image or two
    assert ours["BWT %"] == pytest.approx(package["BWT %"], abs=1)
    assert more != ours


def test_other_rates_of_fine_tuning(chosen, monkeypatch, tmp_path):
    monkeypatch.setattr(fine_tuning, "STUDY", SMALL)
    monkeypatch.setattr(fine_tuning, "ROWS", ("sum", "task_arithmetic"))
    out = tmp_path / "rates.json"
    with jax.numpy_dtype_promotion("standard"):
        call(fine_tuning, monkeypatch, "--rates", 1e-4, 2e-3, "--orders", 1, "--images", 16, "--json", out)
    [table] = json.loads(out.read_text())["tables"]
    assert table["columns"] == ["", "0.0001", "0.002"]
    rows = {row[0]: row[1:] for row in table["rows"]}
    acc, bwt = plain_scores("sum", None, 1)  # of the rate that the models of this test have
    assert rows["sum"][1] == f"{acc:.1f} / {bwt:+.1f}"
    [size] = [values for label, values in rows.items() if label.startswith("‖τ‖")]
    assert 0 < float(size[0]) < float(size[1])
    assert rows["pre-trained"][0] == rows["pre-trained"][1]


def test_published_numbers():
    assert paper_tables.main_results("ViT-L/14", 20)["individual", "ACC"] == (93.5, None)
    assert paper_tables.main_results("ViT-B/32", 8)["opcm", "BWT"] == (-6.3, 1.1)
    assert paper_tables.ablation(20)["sum", "ACC"] == (34.3, 0.0)
    assert paper_tables.glue()["pre-trained", "stsb"] == 62.2
    assert paper_tables.glue()["task_arithmetic", "BWT"] == -4.6
    assert ("NUFILT", 25, 9.3, 129.8, 87.5, "83.3 ± 0.3") in paper_tables.overhead()
    every = {name for name, _ in paper_tables.main_results("ViT-B/16", 14)}
    assert every == set(paper_tables.NAMES)
