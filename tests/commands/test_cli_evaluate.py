"""`nufilt evaluate` and `--evaluate` of merges: scores of small T5s on data sets of texts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from evaluation_commands import NAMES, evaluate, merge, read, with_scores, write_study

from nufilt_jax.cli import main
from nufilt_jax.engine import run as engine_run
from nufilt_jax.errors import ConfigError, Problem
from nufilt_jax.evaluation.suite import Suite
from nufilt_jax.evaluation.t5 import tasks as t5_tasks


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("texts"))


def scores(document):
    return [step.get("accuracy") for step in document["steps"]]


@pytest.fixture(scope="module")
def evaluated(study, tmp_path_factory):
    """A merge that was evaluated after every step: its folder, and a function that copies it."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    assert main([str(part) for part in merge(study, out, *with_scores(study))]) == 0
    return out


@pytest.fixture
def merged(evaluated, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(evaluated, tmp_path / "merged"))


def test_every_step_is_scored_on_every_task(study, merged, tmp_path, nufilt):
    """As if the merge had ended there."""
    recipe = read(merged, "nufilt.json")
    matrix = np.array([[step["accuracy"][name] for step in recipe["steps"]] for name in NAMES])
    assert len(np.unique(matrix)) > 3
    for n_tasks in (1, 2):
        assert nufilt(*merge(study, tmp_path / f"first{n_tasks}", names=NAMES[:n_tasks])).code == 0
        found = nufilt(*evaluate(study, tmp_path / f"first{n_tasks}", *(f"--task={name}" for name in NAMES)))
        assert found.json["evaluation"]["models"][0]["accuracy"] == recipe["steps"][n_tasks - 1]["accuracy"]
    [row] = read(merged)["models"]
    assert row["acc"] == pytest.approx(matrix[:, -1].mean())
    assert row["bwt"] == pytest.approx(np.mean([matrix[0, 2] - matrix[0, 0], matrix[1, 2] - matrix[1, 1]]))
    assert row["accuracy"] == recipe["steps"][-1]["accuracy"]
    assert row["seconds"] == round(sum(step["seconds"] for step in recipe["steps"]), 3)
    assert (merged / "accuracy_matrix.png").read_bytes().startswith(b"\x89PNG")


def test_evaluating_the_folder_gives_the_same_file_again(study, merged, nufilt):
    before = (merged / "evaluation.json").read_bytes()
    for _ in range(2):
        result = nufilt(*evaluate(study, merged))
        assert (result.code, result.err) == (0, "")
        assert (merged / "evaluation.json").read_bytes() == before
        assert result.json == {"out": str(merged), "evaluation": json.loads(before)}
    (merged / "evaluation.json").write_text("{")
    assert nufilt(*evaluate(study, merged)).code == 0
    assert (merged / "evaluation.json").read_bytes() == before
    shown = nufilt(*(part for part in evaluate(study, merged) if part != "--json")).out
    assert all(text in shown for text in (*NAMES, "ACC", "BWT", f"{100 * read(merged)['models'][0]['acc']:.1f}"))
    assert nufilt(*(part for part in evaluate(study, merged, "--quiet") if part != "--json")).out == ""


def test_rows_of_one_file_are_comparable(study, merged, nufilt):
    whole = read(merged)
    other = {**whole["models"][0], "name": "other"}
    (merged / "evaluation.json").write_text(json.dumps(whole | {"models": [other, *whole["models"]]}))
    assert nufilt(*evaluate(study, merged)).json["evaluation"]["models"] == [other, *whole["models"]]
    some = nufilt(*evaluate(study, merged, "--limit", "16")).json["evaluation"]
    assert [row["name"] for row in some["models"]] == ["task_arithmetic"]
    assert (some["limit"], some["models"][0]["bwt"]) == (16, None)  # the steps were scored on all examples
    assert some["models"][0]["accuracy"] == whole["models"][0]["accuracy"]  # 16 are all
    subset = nufilt(*evaluate(study, merged, "--task", "beta")).json["evaluation"]
    [row] = subset["models"]
    assert (subset["tasks"], row["bwt"]) == (["beta"], None)
    assert row["acc"] == row["accuracy"]["beta"] == whole["models"][0]["accuracy"]["beta"]


def test_a_plain_model_is_evaluated_too(study, tmp_path, nufilt):
    model = shutil.copytree(study / "base", tmp_path / "plain")
    result = nufilt(*evaluate(study, model, "--task", "alpha", "--task", "beta", "--limit", "16"))
    [row] = result.json["evaluation"]["models"]
    assert (row["name"], row["bwt"], row["seconds"]) == ("plain", None, None)
    assert list(row["accuracy"]) == ["alpha", "beta"]
    assert read(model) == result.json["evaluation"]


def without_times(document):
    return [{key: row[key] for key in row if key not in ("seconds", "compile")} for row in document["models"]]


def test_a_resumed_merge_keeps_its_scores(study, evaluated, tmp_path, nufilt, stop_before):
    go_on = stop_before("gamma")
    argv = merge(study, tmp_path / "out", *with_scores(study))
    assert nufilt(*argv).code == 130
    go_on()
    result = nufilt(*argv)
    assert [step["resumed"] for step in result.json["steps"]] == [True, True, False]
    assert scores(result.json) == scores(read(evaluated, "nufilt.json"))
    assert without_times(result.json["evaluation"]) == without_times(read(evaluated))


def test_scores_that_nobody_took(study, evaluated, tmp_path, nufilt):
    """Without --evaluate there are none; what came later is scored, and the rest stays unknown."""
    out = tmp_path / "out"
    plain = nufilt(*merge(study, out, names=NAMES[:2]))
    assert scores(plain.json) == [None, None] and "evaluation" not in plain.json
    assert not (out / "evaluation.json").exists()
    later = nufilt(*merge(study, out, *with_scores(study), names=NAMES[:2])).json["evaluation"]
    assert (later["models"][0]["bwt"], list(later["models"][0]["accuracy"])) == (None, ["alpha", "beta"])
    again = nufilt(*merge(study, out, *with_scores(study), names=NAMES[:2])).json["evaluation"]
    assert again == later
    added = nufilt("add", out, "--task", f"gamma={study / 'gamma'}", "--json", *with_scores(study))
    assert scores(added.json)[:2] == [None, None]
    assert scores(added.json)[2] == scores(read(evaluated, "nufilt.json"))[2]
    [row] = added.json["evaluation"]["models"]
    assert (row["bwt"], row["accuracy"]) == (None, read(evaluated)["models"][0]["accuracy"])


def test_a_file_that_answers_another_question_is_no_answer(study, merged, nufilt):
    whole = read(merged)
    other = {**whole["models"][0], "name": "other"}
    argv = merge(study, merged, *with_scores(study))
    for changed in (
        {"limit": 3},
        {"dtype": "bfloat16"},
        {"tasks": ["alpha"]},
        {"models": 3},
        {"models": [{"name": "other", "accuracy": {"alpha": 1.0}, "acc": 1.0}]},
        {"models": [{key: other[key] for key in other if key != "name"}]},
    ):
        (merged / "evaluation.json").write_text(json.dumps(whole | {"models": [other]} | changed))
        for command in (argv, evaluate(study, merged)):
            result = nufilt(*command)
            assert (result.code, result.json["evaluation"]) == (0, whole), result.err
    (merged / "evaluation.json").write_text(json.dumps(whole | {"models": [other]}))
    assert nufilt(*argv).json["evaluation"]["models"] == [other, *whole["models"]]  # it was not in the file
    some = nufilt(*argv, "--limit", "16").json["evaluation"]
    assert (some["limit"], [row["name"] for row in some["models"]]) == (16, ["task_arithmetic"])


def test_an_added_task_has_no_score_before(study, evaluated, tmp_path, nufilt):
    out = tmp_path / "out"
    assert nufilt(*merge(study, out, *with_scores(study), names=NAMES[:2])).code == 0
    added = nufilt("add", out, "--task", f"gamma={study / 'gamma'}", "--json", *with_scores(study))
    whole = scores(read(evaluated, "nufilt.json"))
    assert scores(added.json) == [*({n: row[n] for n in NAMES[:2]} for row in whole[:2]), whole[2]]
    assert without_times(added.json["evaluation"]) == without_times(read(evaluated))


def test_a_merge_whose_model_was_not_written_is_scored_at_the_end(study, evaluated, tmp_path, nufilt, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    write = engine_run.write_checkpoint
    monkeypatch.setattr(engine_run, "write_checkpoint", killed)
    assert nufilt(*merge(study, tmp_path / "out")).code == 130
    monkeypatch.setattr(engine_run, "write_checkpoint", write)
    result = nufilt(*merge(study, tmp_path / "out", *with_scores(study)))
    assert all(step["resumed"] for step in result.json["steps"])
    assert scores(result.json) == [None, None, scores(read(evaluated, "nufilt.json"))[2]]


def test_a_failed_evaluation_keeps_what_is_merged(study, tmp_path, nufilt, monkeypatch):
    score, calls = Suite.score, []

    def failing(self, params, **options):
        calls.append(options)
        if len(calls) == 2:
            raise ConfigError(Problem("task alpha", "a label is -1"))
        return score(self, params, **options)

    monkeypatch.setattr(Suite, "score", failing)
    result = nufilt(*merge(study, tmp_path / "out", *with_scores(study)))
    assert (result.code, result.err) == (1, "nufilt: task alpha: a label is -1\n")
    assert [step["resumed"] for step in nufilt(*merge(study, tmp_path / "out")).json["steps"]] == [True, True, False]


def test_scores_of_a_base_that_was_itself_merged_are_not_copied(study, merged, tmp_path, nufilt):
    argv = ("--base", merged, "--task", f"alpha={study / 'alpha'}", "--method", "sum", "--out", tmp_path / "out")
    assert nufilt("merge", *argv).code == 0
    assert not {"evaluation.json", "accuracy_matrix.png"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_two_devices_give_the_same_scores(study, merged, finish):
    code = "import sys; from nufilt_jax.cli import main; sys.exit(main())"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    argv = evaluate(study, merged, "--task", "alpha")
    result = finish("-c", code, *argv, env=flags)
    assert (result.code, result.err) == (0, ""), result.err
    [row] = result.json["evaluation"]["models"]
    assert row["accuracy"]["alpha"] == read(merged, "nufilt.json")["steps"][-1]["accuracy"]["alpha"]


def test_half_precision(study, merged, nufilt, monkeypatch):
    dtypes = []

    def answered(params, tokens, config, *, dtype):
        dtypes.append(dtype)
        return []

    monkeypatch.setattr(t5_tasks, "generated", answered)
    found = nufilt(*evaluate(study, merged, "--dtype", "bfloat16")).json["evaluation"]
    assert (found["dtype"], found["models"][0]["bwt"], dtypes) == ("bfloat16", None, ["bfloat16"] * 3)
