"""`nufilt evaluate` and `--evaluate`: what is refused, models of images, and the built-in ones."""

import json
import shutil

import image_models as images
import numpy as np
import pytest
from evaluation_commands import evaluate, merge, read, with_scores, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("texts"))


def test_a_description_that_cannot_be_used(study, tmp_path, refused):
    described = read(study, "tasks.json")
    described["gamma"] |= {"answers": None}
    (tmp_path / "tasks.json").write_text(json.dumps(described))
    options = ("--tasks-file", tmp_path / "tasks.json")
    model, out = shutil.copytree(study / "base", tmp_path / "base"), tmp_path / "out"
    for argv in (
        merge(study, out, "--evaluate"),
        merge(study, out, "--evaluate", "--plan"),
        ("evaluate", model, "--task", "alpha"),
    ):
        (line,) = refused(*argv, *options)
        assert line.startswith(f"nufilt: {tmp_path / 'tasks.json'}: gamma.answers: ")


def test_tasks_that_do_not_fit(study, tmp_path, refused):
    """Unknown ones, and one of images; by the plan, by the merge and by `evaluate` alike."""
    model, out = shutil.copytree(study / "base", tmp_path / "base"), tmp_path / "out"
    more = [part for name in ("delta", "mnist") for part in ("--task", f"{name}={study / 'gamma'}")]
    for argv in (
        merge(study, out, *more, *with_scores(study)),
        merge(study, out, *more, *with_scores(study), "--plan"),
        evaluate(study, model, *(f"--task={name}" for name in ("alpha", "delta", "mnist"))),
    ):
        unknown, foreign = refused(*argv)
        assert unknown.startswith(
            "nufilt: task delta: is not known (describe it in a file for --tasks-file; known are "
        )
        assert "alpha, beta, gamma" in unknown and "mnist" not in unknown
        assert foreign == "nufilt: task mnist: is one of images, but the model is 't5' (leave it out)"


def test_text_tasks_are_not_for_images(shared_models, tmp_path, refused):
    argv = ("--base", shared_models / "base", "--task", f"cola={shared_models / 'alpha'}", "--evaluate")
    for command in (("merge", *argv, "--out", tmp_path / "out"), ("plan", *argv)):
        assert refused(*command) == [
            "nufilt: task cola: is one of text, but the model is 'clip_vision_model' (leave it out)"
        ]


def test_everything_that_is_missing_is_listed(study, tmp_path, refused):
    """Before the weights are read; a plan opens no data."""
    base = shutil.copytree(study / "base", tmp_path / "base")
    (base / "tokenizer.json").unlink()
    described = read(study, "tasks.json")
    described["beta"] |= {"dataset": "./nowhere"}
    described["gamma"] |= {"dataset": str(study / "data" / "gamma"), "prompt": "is {nothing}?"}
    described["alpha"] |= {"dataset": str(study / "data" / "alpha")}
    (tmp_path / "tasks.json").write_text(json.dumps(described))
    argv = list(merge(study, tmp_path / "out", "--evaluate", "--tasks-file", tmp_path / "tasks.json"))
    argv[2] = base
    lines = refused(*argv)
    assert len(lines) == 3
    assert lines[0].startswith(f"nufilt: {base}: has no tokenizer.json")
    assert lines[1] == f"nufilt: task beta: data set {tmp_path / 'nowhere'}: there is no such folder"
    assert lines[2].startswith("nufilt: task gamma: the data set has no column 'nothing'")


def test_a_plan_downloads_nothing(study, tmp_path, nufilt):
    described = read(study, "tasks.json")
    for name in ("alpha", "gamma"):
        described[name] |= {"dataset": str(study / "data" / name)}
    described["beta"] |= {"dataset": "org/not-there"}
    (tmp_path / "tasks.json").write_text(json.dumps(described))
    argv = merge(study, tmp_path / "out", "--evaluate", "--tasks-file", tmp_path / "tasks.json")
    assert nufilt(*argv, "--plan").code == 0
    result = nufilt(*argv, "--offline")
    assert result.code == 1 and result.lines[0].startswith("nufilt: task beta: data set org/not-there: ")
    assert list(tmp_path.iterdir()) == [tmp_path / "tasks.json"]


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        (("--limit", "0"), 1, "--limit: must be at least 1, got 0"),
        (("--limit", "1.5"), 2, ""),
        (("--dtype", "float16"), 1, "--dtype: must be one of float32, bfloat16, got 'float16'"),
        (("--task", "alpha", "--tasks-file", "nowhere.json"), 1, "nowhere.json: cannot be read"),
        ((), 1, "--task: is missing: no recipe in "),
        (("--task",), 2, ""),
    ],
    ids=str,
)
def test_refused_by_evaluate(study, tmp_path, refused, options, code, expected):
    model = shutil.copytree(study / "base", tmp_path / "base")
    (line,) = refused("evaluate", model, *options, code=code)
    assert line.startswith(f"nufilt: {expected}")


def test_no_folder(tmp_path, refused):
    for name in ("nowhere", "org/model"):
        (line,) = refused("evaluate", tmp_path / name, "--task", "cola")
        assert line.startswith(f"nufilt: {tmp_path / name}: there is no such folder")


def test_options_that_belong_to_evaluate(study, tmp_path, refused):
    for options in (("--limit", "3"), ("--tasks-file", "x"), ("--heads-from", "x")):
        (line,) = refused(*merge(study, tmp_path / "out", *options), code=2)
        assert line.startswith(f"nufilt: {options[0]}: belongs to --evaluate")
    (line,) = refused(*merge(study, tmp_path / "out", *with_scores(study, "--limit", "-1")))
    assert line == "nufilt: --limit: must be at least 1, got -1"


def test_built_in_models_are_known_without_a_description(tmp_path, nufilt):
    out = tmp_path / "out"
    merged = nufilt("merge", "--model", "tiny", "--method", "sum", "--limit", "40", "--out", out, "--json", "-v")
    phases = [line.split(" s  ", 1)[1].split(": compiling")[0] for line in merged.err.splitlines() if " s  " in line]
    writing = phases.index("writing the model")
    assert [phase for phase in dict.fromkeys(phases[writing:]) if "(" not in phase] == [
        "writing the model",
        "for comparison: measuring base and tasks",
        "drawing the accuracies",
    ]
    assert "for comparison: weight_average, letters (2 of 6)" in phases[writing:]
    assert merged.code == 0, merged.err
    document = read(out)
    names = ["pre-trained", "individual", "weight_average", "task_arithmetic", "sum"]
    assert [row["name"] for row in document["models"]] == names
    assert merged.json["evaluation"] == document
    assert all(step["accuracy_limit"] == 40 and len(step["accuracy"]) == 6 for step in merged.json["steps"])
    before = (out / "evaluation.json").read_bytes()
    for _ in range(2):
        assert nufilt("evaluate", out, "--limit", "40").code == 0
        assert (out / "evaluation.json").read_bytes() == before
    few = nufilt("evaluate", out, "--limit", "20", "--task", "shapes", "--json").json["evaluation"]
    assert (few["tasks"], len(few["models"])) == (["shapes"], 1)
    half = nufilt("evaluate", out, "--dtype", "bfloat16", "--json").json["evaluation"]["models"][0]
    assert abs(half["acc"] - document["models"][-1]["acc"]) < 0.15  # of other images too
    added = nufilt("plan", "--add", out, "--task", f"mine={tmp_path}", "--evaluate")
    assert "nufilt: task mine: is not known" in added.err


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A whole CLIP model, its vision half alone, two towers near it, and a file that describes their tasks."""
    folder = tmp_path_factory.mktemp("images")
    whole = images.params(0)
    images.write_model(folder / "base", whole)
    half = images.vision_half(whole)
    images.write_model(folder / "half", half, {**images.CONFIG["vision_config"], "model_type": "clip_vision_model"})
    (folder / "half" / "tokenizer.json").unlink()
    described = {}
    for seed, name in enumerate(("foxes", "leaves"), 1):
        noise = images.vision_half(images.params(seed))
        images.write_model(folder / name, {key: x + np.float32(0.5) * noise[key] for key, x in half.items()})
        labels = np.random.default_rng(seed).integers(0, 3, 12).tolist()
        images.write_data(folder / "data" / name, images.images(12, seed), labels)
        data = {"dataset": f"./data/{name}", "split": "test"}
        described[name] = {"kind": "image", "templates": ["a photo of a {}."], **data}
    (folder / "tasks.json").write_text(json.dumps(described))
    return folder


def test_image_models_take_their_heads_from_a_text_tower(clip, tmp_path, nufilt):
    """The base's own, or that of another model where the base has none."""
    tasks = [part for name in ("foxes", "leaves") for part in ("--task", f"{name}={clip / name}")]
    rest = (*tasks, "--method", "sum", "--evaluate", "--tasks-file", clip / "tasks.json", "--json")
    whole = nufilt("merge", "--base", clip / "base", "--out", tmp_path / "whole", *rest)
    assert whole.code == 0, whole.err
    half_argv = ("merge", "--base", clip / "half", "--out", tmp_path / "half", *rest)
    half = nufilt(*half_argv, "--heads-from", clip / "base")
    assert half.code == 0, half.err
    scores = [step["accuracy"] for step in whole.json["steps"]]
    assert [step["accuracy"] for step in half.json["steps"]] == scores
    assert len({score for row in scores for score in row.values()}) > 1
    for out, more in ((tmp_path / "whole", ()), (tmp_path / "half", ("--heads-from", clip / "base"))):
        again = nufilt("evaluate", out, "--tasks-file", clip / "tasks.json", "--json", *more)
        assert again.json["evaluation"] == read(out)


def test_image_models_without_heads(clip, tmp_path, refused):
    base = shutil.copytree(clip / "base", tmp_path / "base")
    (base / "tokenizer.json").unlink()
    (base / "preprocessor_config.json").unlink()
    described = {
        name: entry | {"dataset": str(clip / "data" / name)} for name, entry in read(clip, "tasks.json").items()
    }
    described["leaves"] |= {"dataset": "./nowhere"}
    (tmp_path / "tasks.json").write_text(json.dumps(described))
    options = ("--task", "foxes", "--task", "leaves", "--tasks-file", tmp_path / "tasks.json")
    half = shutil.copytree(clip / "half", tmp_path / "half")
    nowhere = f"nufilt: task leaves: data set {tmp_path / 'nowhere'}: there is no such folder"
    no_tower, no_data = refused("evaluate", half, *options)
    assert no_tower.startswith(f"nufilt: {half}: has no text tower") and no_data == nowhere
    no_preprocessor, no_tokenizer, no_data = refused("evaluate", base, *options)
    assert no_preprocessor.startswith(f"nufilt: {base}/preprocessor_config.json: cannot be read")
    assert no_tokenizer.startswith(f"nufilt: {base}: has no tokenizer.json") and no_data == nowhere
