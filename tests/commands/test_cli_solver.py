"""`--solver closed_form` through the whole command, and merges whose recipes are older than it."""

import json

import model_builders as build
import pytest

RANKS = ("--filter-rank", "4", "--task-rank", "2", "--decomposition", "svd")  # which compiles fastest
ADAM = (*RANKS, "--adapter-rank", "2", "--steps", "4")
CLOSED = (*RANKS, "--solver", "closed_form")


def merge(models, out, *options, names=build.TASKS[:3]):
    tasks = [part for name in names for part in ("--task", f"{name}={models / name}")]
    return ("merge", "--base", models / "base", *tasks, "--out", out, *options)


def add(models, out, *options):
    return ("add", out, "--task", f"delta={models / 'delta'}", *options)


def test_it_merges_and_continues(shared_models, tmp_path, nufilt):
    whole = nufilt(*merge(shared_models, tmp_path / "whole", *CLOSED, "--json", names=build.TASKS))
    assert (whole.code, whole.err) == (0, "")
    assert (whole.json["config"]["solver"], whole.json["config"]["ridge"]) == ("closed_form", 1.0)
    first, *later = (step["losses"] for step in whole.json["steps"])
    assert first == [] and all(len(losses) == 2 and losses[1] < losses[0] for losses in later)
    told = nufilt(*merge(shared_models, tmp_path / "grown", *CLOSED))
    assert told.code == 0 and f"{whole.json['steps'][1]['losses'][1]:.4g}" in told.out
    added = nufilt(*add(shared_models, tmp_path / "grown", "--json"))
    assert (added.code, [step["resumed"] for step in added.json["steps"]]) == (0, [True, True, True, False])
    assert build.weight_bytes(tmp_path / "whole") == build.weight_bytes(tmp_path / "grown")
    layers = json.loads((tmp_path / "whole" / "forecast.json").read_text())["steps"][1]["layers"]
    assert all(row["loss_after"] < row["loss_before"] and row["drift"] < 1e-10 for row in layers.values())
    assert all(row["restored_share"] > 0 for row in layers.values())
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "| solver | closed_form |" in card and "| ridge | 1.0 |" in card


def test_the_same_command_with_another_solver_or_ridge_is_refused(shared_models, tmp_path, nufilt):
    out = tmp_path / "out"
    assert nufilt(*merge(shared_models, out, *CLOSED, "--method-args", "ridge=0.5")).code == 0
    before = build.snapshot(out)
    again = nufilt(*merge(shared_models, out, *CLOSED, "--method-args", "ridge=0.5", "--json"))
    assert again.code == 0 and all(step["resumed"] for step in again.json["steps"])
    for options, messages in (
        (CLOSED, ["--method-args: ridge is 0.5 in the merge in"]),
        ((*RANKS, "--solver", "adam"), ["--solver: is 'closed_form' in the merge in", "--method-args: ridge is 0.5"]),
    ):
        result = nufilt(*merge(shared_models, out, *options))
        assert (result.code, len(result.lines)) == (1, len(messages)), result.err
        assert all(message in result.err for message in messages)
    result = nufilt(*add(shared_models, out, "--solver", "adam"))
    assert result.code == 1 and "--solver: is 'closed_form' in this merge, got 'adam'" in result.err
    assert build.snapshot(out) == before


@pytest.mark.parametrize(
    ("options", "warnings"),
    [
        ((*CLOSED, "--steps", "9"), ["--steps: has no effect: the solver is closed_form"]),
        (
            (*CLOSED, "--adapter-rank", "2", "--method-args", "learning_rate=0.1", "steps=4"),
            [
                f"--{name}: has no effect: the solver is closed_form"
                for name in ("adapter-rank", "steps", "learning-rate")
            ],
        ),
        ((*RANKS, "--method-args", "ridge=2"), ["--method-args: ridge has no effect: the solver is adam"]),
        (("--method", "sum", "--solver", "closed_form"), ["--solver: no effect: sum has no such setting"]),
        ((*CLOSED, "--method", "adapter_only"), ["--solver: no effect: adapter_only has no such setting"]),
        ((*CLOSED, "--method-args", "ridge=2"), []),
        ((*RANKS, "--steps", "4", "--solver", "adam"), []),
    ],
)
def test_settings_without_effect_are_told(options, warnings, shared_models, tmp_path, nufilt):
    result = nufilt(*merge(shared_models, tmp_path / "out", *options, "--plan"))
    assert (result.code, result.lines) == (0, [f"nufilt: warning: {line}" for line in warnings])


def test_a_presets_settings_are_no_reason_to_warn(tmp_path, nufilt, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = nufilt("merge", "--model", "tiny", "--solver", "closed_form", "--plan", "--json")
    assert (result.code, result.err, result.json["config"]["adapter_rank"]) == (0, "", 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--solver", "sgd"), "nufilt: --solver: must be one of adam, closed_form, got 'sgd'"),
        (("--method-args", "ridge=0"), "nufilt: --method-args: ridge must be at least 0.0001, got 0.0"),
        (("--method-args", "ridge=inf"), "nufilt: --method-args: ridge must be a finite number, got inf"),
        (("--method-args", "ridge=much"), "nufilt: --method-args: ridge must be a number, got 'much'"),
    ],
)
def test_bad_settings_are_refused(options, message, shared_models, tmp_path, refused):
    assert refused(*merge(shared_models, tmp_path / "out", *RANKS, *options)) == [message]


@pytest.fixture
def older(shared_models, tmp_path, nufilt):
    """A merge of three tasks whose recipe is of a version without `solver` and `ridge`; the same command again."""
    command = merge(shared_models, tmp_path / "out", *ADAM, "--json")
    assert nufilt(*command).code == 0
    path = tmp_path / "out" / "nufilt.json"
    recipe = json.loads(path.read_text())
    del recipe["config"]["solver"], recipe["config"]["ridge"]
    path.write_text(json.dumps(recipe))
    return tmp_path / "out", command


def test_an_older_merge_is_known_and_continued(older, shared_models, tmp_path, nufilt):
    out, command = older
    before = build.snapshot(out)
    again = nufilt(*command)
    assert (again.code, [step["resumed"] for step in again.json["steps"]]) == (0, [True] * 3)
    assert build.snapshot(out) == before
    closed = nufilt(*command, "--solver", "closed_form")
    assert closed.code == 1 and "--solver: is 'adam' in the merge in" in closed.err
    added = nufilt(*add(shared_models, out, "--json"))
    assert (added.code, added.json["config"]["solver"], added.json["config"]["ridge"]) == (0, "adam", 1.0), added.err
    assert nufilt(*merge(shared_models, tmp_path / "whole", *ADAM, names=build.TASKS)).code == 0
    assert build.weight_bytes(out) == build.weight_bytes(tmp_path / "whole")
