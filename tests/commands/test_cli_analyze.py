"""`nufilt analyze`: built-in models, models with data sets, and models of which no image is at hand."""

import dataclasses
import json
import re
import shutil
import sys

import adapter_builders as adapters
import image_models
import model_builders as build
import numpy as np
import pytest

from nufilt_jax import load
from nufilt_jax.analysis.document import as_array
from nufilt_jax.cli import main
from nufilt_jax.methods.adamerging import AdaMergingConfig
from nufilt_jax.output.place import OutputPlace
from nufilt_jax.zoo import draw, materialise
from nufilt_jax.zoo.families import IMAGE_MEAN, IMAGE_STD

TASKS = ("letters", "shapes")
RANKS = {"filter_rank": 16, "adapter_rank": 4, "task_rank": 4, "steps": 8}
PICTURES = {f"affinity_{group}.png" for group in ("whole_model", "attention", "mlp", "curves")} | {"losses.png"}


@pytest.fixture(scope="module")
def built_in(tmp_path_factory):
    """Two built-in models, merged by NUFILT; scores are put in by hand."""
    zoo, out = materialise(), tmp_path_factory.mktemp("merged") / "out"
    tasks = [part for name in TASKS for part in ("--task", f"{name}={zoo.tasks[name]}")]
    ranks = [part for key, value in RANKS.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    ranks += ["--decomposition", "svd"]  # the quickest to compile
    assert main(["merge", "--base", str(zoo.base), *tasks, "--out", str(out), *ranks, "--quiet"]) == 0
    recipe = json.loads((out / "nufilt.json").read_text())
    for step, scores in zip(
        recipe["steps"], ({"letters": 0.75, "shapes": 0.5}, {"letters": 0.5, "shapes": 1}), strict=True
    ):
        step["accuracy"] = scores
    (out / "nufilt.json").write_text(json.dumps(recipe))
    return out


@pytest.fixture(scope="module")
def analyzed(built_in, tmp_path_factory):
    out = tmp_path_factory.mktemp("analyzed") / "out"
    shutil.copytree(built_in, out)
    assert main(["analyze", str(out), "--images", "20", "--quiet"]) == 0
    return out


@pytest.fixture
def merged(built_in, tmp_path):
    return shutil.copytree(built_in, tmp_path / "out")


def document(folder):
    return json.loads((folder / "analysis.json").read_text())


def changes(folder, before):
    return {name for name, x in build.snapshot(folder).items() if name not in before}


def test_a_built_in_merge_is_told_of_in_full(analyzed):
    found = document(analyzed)
    assert (found["tasks"], found["method"], found["images"], found["missing"]) == (list(TASKS), "nufilt", 20, {})
    accuracy = found["accuracy"]
    assert (accuracy["matrix"], accuracy["acc"], accuracy["bwt"]) == ([[0.75, 0.5], [0.5, 1.0]], 0.75, -0.25)
    assert accuracy["lost"] == [None, 0.25]
    assert len(found["affinity"]["layers"]) == 12 and len(found["losses"]["layers"]) == 10
    values = as_array(found["affinity"]["values"])
    assert values.shape == (2, 2, 12) and (values > found["affinity"]["random"]).mean() > 0.9
    steps = found["losses"]["methods"]["nufilt"]["relative"]["whole model"]
    assert steps["plasticity"][0] == 0  # the first model is taken as it is
    assert steps["stability"][0] is None and 0 < steps["stability"][1] < 2 and 0 < steps["plasticity"][1] < 2
    assert set(found["forecast_check"]) >= {"drift_and_stability", "added_share_and_stability"}
    assert {path.name for path in (analyzed / "analysis").iterdir()} == PICTURES | {"accuracy.png", "forecast.png"}
    page = (analyzed / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 7 and page.count("Not known") == 1  # no other models


def test_losses_are_those_of_the_merge_in_the_folder(analyzed):
    """On the answers of the first attention layer itself, whose inputs are easily had."""
    layer, base = "vision_model.encoder.layers.0.self_attn.v_proj.weight", load(str(materialise().base))
    own = [load(str(materialise().tasks[name])) for name in TASKS]
    merged = load(str(analyzed))
    found = document(analyzed)["losses"]
    place, losses = found["layers"].index(layer), found["methods"]["nufilt"]
    x = [inputs(model, name) for model, name in zip(own, TASKS, strict=True)]

    def square(weights, others, rows):
        return np.mean(np.sum((rows @ (weights[layer] - others[layer]).astype(np.float64).T) ** 2, axis=1))

    assert losses["stability"][0][1][place] == pytest.approx(square(merged, own[0], x[0]), rel=1e-3)
    assert losses["plasticity"][1][place] == pytest.approx(square(merged, own[1], x[1]), rel=1e-3)
    assert losses["size"][1][place] == pytest.approx(square(own[1], base, x[1]), rel=1e-3)


def inputs(model, name):
    """What the first block's attention is given: all before it, in NumPy."""
    raw = draw(name, "test", 20)[0].astype(np.float64) / 255
    pixels = (raw - np.array(IMAGE_MEAN)[:, None, None]) / np.array(IMAGE_STD)[:, None, None]
    p = {key: value.astype(np.float64) for key, value in model.items()}
    tiles = pixels.reshape(20, 3, 4, 8, 4, 8).transpose(0, 2, 4, 1, 3, 5).reshape(20, 16, -1)
    tokens = tiles @ p["vision_model.embeddings.patch_embedding.weight"].reshape(128, -1).T
    first = np.broadcast_to(p["vision_model.embeddings.class_embedding"], (20, 1, 128))
    hidden = np.concatenate([first, tokens], axis=1) + p["vision_model.embeddings.position_embedding.weight"]
    for norm in ("vision_model.pre_layrnorm", "vision_model.encoder.layers.0.layer_norm1"):
        hidden = hidden - hidden.mean(-1, keepdims=True)
        hidden = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-5)
        hidden = hidden * p[f"{norm}.weight"] + p[f"{norm}.bias"]
    return hidden.reshape(-1, 128)


def test_output_as_json_and_as_a_table(analyzed, nufilt):
    before = document(analyzed), (analyzed / "report.html").read_bytes()
    told = nufilt("analyze", analyzed, "--images", "20", "--json")
    assert (told.code, told.err) == (0, "") and told.json == {"out": str(analyzed), **before[0]}
    assert (document(analyzed), (analyzed / "report.html").read_bytes()) == before  # again, and the same
    table = nufilt("analyze", analyzed, "--images", "20")
    assert all(word in table.out for word in ("letters", "stability", "own task", "report.html"))
    assert re.search(r"\n +2 +shapes +25\.0 ", table.out)  # points of a percent, as accuracies are shown


def evaluation(folder, acc, **head):
    """Scores as `nufilt evaluate` writes them, of the merge itself."""
    row = {"name": "nufilt", "accuracy": dict.fromkeys(TASKS, acc), "acc": acc, "bwt": None, "seconds": 1, "compile": 0}
    content = {"tasks": list(TASKS), "limit": None, "dtype": "float32", "models": [row]} | head
    (folder / "evaluation.json").write_text(json.dumps(content))


def test_scores_of_other_examples_are_not_compared(merged, nufilt):
    evaluation(merged, 0.625)
    assert nufilt("analyze", merged, "--images", "1", "--json").json["missing"] == {}
    assert "62.5" in (merged / "report.html").read_text()
    one = "the scores in evaluation.json are"
    for head, why in (
        ({"limit": 3}, f"{one} of at most 3 examples in float32, those after each step of all in float32"),
        ({"dtype": "bfloat16"}, f"{one} of all examples in bfloat16, those after each step of all in float32"),
        ({"tasks": ["letters"]}, f"{one} of other tasks"),
    ):
        evaluation(merged, 0.625, **head)
        assert f"comparison: not known: {why}" in " ".join(nufilt("analyze", merged, "--images", "1").out.split())
        content = (merged / "report.html").read_text()
        assert f"Not known: {why}." in content and "62.5" not in content
        assert document(merged)["limit"] is None and "test accuracy, %" in content


def test_scores_of_some_examples(merged, nufilt):
    """Of a merge with --evaluate --limit, and of one that was evaluated later."""
    recipe = json.loads((merged / "nufilt.json").read_text())
    for step in recipe["steps"]:
        step["accuracy_limit"] = 3
    (merged / "nufilt.json").write_text(json.dumps(recipe))
    evaluation(merged, 0.625, limit=3)
    assert "accuracies are of at most 3 examples of each task" in nufilt("analyze", merged, "--images", "1").out
    head = '<thead><tr><th scope="col">test accuracy of at most 3 examples, %'
    assert (merged / "report.html").read_text().count(head) == 2 and document(merged)["limit"] == 3
    for step in recipe["steps"]:
        del step["accuracy"], step["accuracy_limit"]
    (merged / "nufilt.json").write_text(json.dumps(recipe))
    assert nufilt("analyze", merged, "--images", "1").code == 0
    content = (merged / "report.html").read_text()
    assert content.count(head) == 1 and "ACC is 62.5&nbsp;%." in content
    assert "All scores are of at most 3 examples of each task." in content and document(merged)["accuracy"] is None


def test_a_method_that_learns_is_not_merged_again(merged, nufilt):
    recipe = json.loads((merged / "nufilt.json").read_text())
    recipe |= {"method": "adamerging", "config": dataclasses.asdict(AdaMergingConfig())}
    (merged / "nufilt.json").write_text(json.dumps(recipe))
    found = nufilt("analyze", merged, "--images", "4", "--json").json
    assert found["missing"] == {"losses": "adamerging needs unlabelled examples, and is not merged again"}
    assert found["losses"] is None and found["affinity"] is not None
    assert "is not merged again" in (merged / "report.html").read_text()


def test_models_that_have_changed_are_not_measured(shared_models, merged, nufilt, tmp_path):
    recipe = json.loads((merged / "nufilt.json").read_text())
    recipe["tasks"][1]["sha256"]["model.safetensors"] = "0" * 64
    (merged / "nufilt.json").write_text(json.dumps(recipe))
    found = nufilt("analyze", merged, "--images", "4", "--json").json
    assert "has changed since the merge" in found["missing"]["losses"]
    assert found["accuracy"] is not None and found["forecast"] is not None
    shutil.rmtree(merged / "analysis")
    recipe["tasks"][1]["source"] = str(tmp_path / "nowhere")
    (merged / "nufilt.json").write_text(json.dumps(recipe))
    assert "nowhere" in nufilt("analyze", merged, "--json").json["missing"]["affinity"]


@pytest.fixture(scope="module")
def with_data(tmp_path_factory):
    """A whole CLIP model, two vision towers near it, and data sets of their tasks."""
    folder = tmp_path_factory.mktemp("images")
    whole, described = image_models.params(), {}
    image_models.write_model(folder / "base", whole)
    vision = image_models.CONFIG["vision_config"] | {"model_type": "clip_vision_model"}
    for seed, name in enumerate(("alpha", "beta"), 1):
        near = build.fine_tuned(image_models.vision_half(whole), seed)
        image_models.write_model(folder / name, near, vision)
        image_models.write_data(folder / "data" / name, image_models.images(6, seed), [0, 1, 2] * 2)
        described[name] = {"kind": "image", "dataset": f"./data/{name}", "split": "test", "templates": ["a {}"]}
    (folder / "tasks.json").write_text(json.dumps(described))
    return folder


def test_data_sets_are_read_where_they_are_described(with_data, tmp_path, nufilt):
    out = tmp_path / "out"
    tasks = [part for name in ("alpha", "beta") for part in ("--task", f"{name}={with_data / name}")]
    assert nufilt("merge", "--base", with_data / "base", *tasks, "--out", out, "--method", "sum").code == 0
    unknown = nufilt("analyze", out, "--json")
    assert unknown.json["missing"]["losses"].startswith("task alpha, task beta: no data set of images is known")
    result = nufilt("analyze", out, "--tasks-file", with_data / "tasks.json", "--images", "4", "--json")
    assert result.code == 0, result.err
    found = result.json
    assert (found["images"], found["missing"]) == (4, {})
    # The sum keeps what each task's fine-tuning did: what a step changes for the first is τ of the second.
    losses = found["losses"]["methods"]["sum"]
    assert len(found["losses"]["layers"]) == 5 and as_array(losses["stability"])[0, 1].min() > 0
    np.testing.assert_allclose(as_array(losses["plasticity"])[0], 0, atol=1e-9)
    assert found["forecast"] is None and found["accuracy"] is None


def measured(nufilt, study, out, tasks, *options):
    given = [part for name, folder in tasks.items() for part in ("--task", f"{name}={folder}")]
    merged = nufilt("merge", "--base", study / "base", *given, "--out", out, "--method", "sum", *options)
    assert merged.code == 0, merged.err
    result = nufilt("analyze", out, "--tasks-file", study / "tasks.json", "--images", "4", "--json")
    assert result.code == 0 and result.json["missing"] == {}, result.err
    return result.json


def test_a_task_is_read_as_the_merge_read_it(with_data, tmp_path, nufilt):
    """Its names begin otherwise than the base's."""
    plain = measured(nufilt, with_data, tmp_path / "plain", {name: with_data / name for name in ("alpha", "beta")})
    wrapped = {f"module.{name}": x for name, x in build.weights(with_data / "beta").items()}
    vision = json.loads((with_data / "beta" / "config.json").read_text())
    image_models.write_model(tmp_path / "beta", wrapped, vision)
    tasks = {"alpha": with_data / "alpha", "beta": tmp_path / "beta"}
    found = measured(nufilt, with_data, tmp_path / "out", tasks)
    assert (found["losses"], found["affinity"]) == (plain["losses"], plain["affinity"])


def test_an_adapter_whose_base_was_not_read(with_data, tmp_path, nufilt):
    whole = image_models.params()
    modules = [f"vision_model.encoder.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.fc1")]
    tasks = {}
    for seed, name in enumerate(("alpha", "beta")):
        pairs = adapters.factors(whole, seed, modules=modules)
        tasks[name] = adapters.write(tmp_path / name, pairs, base_model_name_or_path=str(with_data / "base"))
    found = measured(nufilt, with_data, tmp_path / "out", tasks, "--output", "adapter")
    assert all(
        name.endswith("#header")
        for name in json.loads((tmp_path / "out" / "nufilt.json").read_text())["base"]["sha256"]
    )
    assert np.nanmax(as_array(found["losses"]["methods"]["sum"]["plasticity"])[0]) < 1e-6


def test_one_reason_is_told_once(with_data, tmp_path, nufilt):
    """Three data sets that are not there for one reason, and two parts of the report that need them."""
    tasks = [part for name in ("sun397", "gtsrb", "mnist") for part in ("--task", f"{name}={with_data / 'alpha'}")]
    out = tmp_path / "out"
    assert nufilt("merge", "--base", with_data / "base", *tasks, "--method", "sum", "--out", out).code == 0
    told = [line for line in nufilt("analyze", out).out.splitlines() if "not known" in line]
    assert len(told) == 1 and told[0].startswith("affinity, losses: not known: task sun397: data set ")
    assert told[0].count("is not on this machine") == 1 and "task mnist: data set" in told[0]


def test_without_images_the_report_has_the_rest(shared_models, tmp_path, nufilt, command):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, "--method", "sum")).code == 0
    before = build.snapshot(out)
    result = nufilt("analyze", out)
    assert (result.code, result.err) == (0, "")
    assert "affinity, losses: not known: config.json" in result.out and "report.html" in result.out
    assert changes(out, before) == {"analysis", "analysis.json", "report.html"}
    page, reason = (out / "report.html").read_text(), document(out)["missing"]["losses"]
    assert reason.startswith("config.json: hidden_size 16")
    assert "nothing was evaluated" in page and f"Not known: {reason}." in page
    assert all(f'<section id="{name}">' in page for name in ("time", "recipe"))
    # One more task is another merge: what was told of this one goes with it.
    assert nufilt("add", out, "--task", f"delta={shared_models / 'delta'}").code == 0
    assert not (out / "report.html").exists() and not (out / "analysis").exists()


def test_without_matplotlib_there_are_numbers(merged, nufilt, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = nufilt("analyze", merged, "--images", "4", "--quiet")
    assert (result.code, result.out) == (0, "")
    assert result.lines == [
        "nufilt: warning: pictures: drawing needs matplotlib, which is not installed (pip install 'nufilt_jax[plots]')"
    ]
    assert "data:image" not in (merged / "report.html").read_text() and document(merged)["losses"] is not None


@pytest.mark.parametrize(
    ("argv", "code", "line"),
    [
        ((), 2, ""),
        (("nowhere",), 1, "nowhere: holds no finished merge (give the output folder of a merge)"),
        (("empty",), 1, "empty: holds no finished merge (give the output folder of a merge)"),
        (("empty", "--images", "0"), 1, "--images: must be at least 1, got 0"),
        (("empty", "--images", "1.5"), 2, ""),
        (("empty", "--tasks-file", "none.json"), 1, "none.json"),
        (("empty", "--method", "sum"), 2, "--method: must be MODULE:RULE, got 'sum'"),
        (("empty", "--seed", "1"), 2, ""),
    ],
    ids=str,
)
def test_refused(tmp_path, refused, monkeypatch, argv, code, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert line in "\n".join(refused("analyze", *argv, code=code))


def test_a_merge_under_way_is_left_alone(merged, refused):
    with OutputPlace(merged).locked():
        assert refused("analyze", merged, "--images", "4") == [
            f"nufilt: {merged}: another run is writing here (wait for it, or choose another --out)"
        ]
