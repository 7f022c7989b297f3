"""The HTML page, read back with a parser: every section, nothing from outside, every name as text."""

import base64
import html.parser
import re

import analysis_builders as build
import numpy as np
import pytest

from nufilt_jax.analysis.document import as_array, as_json, make_document
from nufilt_jax.analysis.losses import layer_stability, relative
from nufilt_jax.analysis.report import report_page
from nufilt_jax.analysis.verdict import verdict

TASKS = ["sun397", "cars", "dtd"]
SECTIONS = ["verdict", "comparison", "accuracy", "forecast", "losses", "affinity", "check", "time", "recipe"]
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "a&b", "javascript:alert(3)", "]]>--><b>"]
VOID = {"meta", "img", "br", "hr", "wbr", "link", "input"}


class Page(html.parser.HTMLParser):
    """Elements, attributes and texts of a page that is well formed."""

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.attributes, self.sections = [], [], [], {}
        self.rows = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id")))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for tag, name in self.open:
            if tag == "section":
                self.sections[name] = self.sections.get(name, "") + data.replace("\xa0", " ")
        if self.open and self.open[-1][0] in ("td", "th"):
            self.rows[-1][-1] += data


def page(document, recipe=None, pictures=None):
    return Page(report_page(document, recipe or build.recipe(document["tasks"]), pictures or {}))


def is_harmless(found):
    assert {"script", "link", "iframe", "object", "form", "base"}.isdisjoint(found.tags)
    for tag, name, value in found.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "action", "data", "srcset", "poster"):
            assert (tag, name) == ("img", "src") and value.startswith("data:image/png;base64,")
    policy = [value for _, name, value in found.attributes if name == "content" and "default-src" in value]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    return True


def test_every_section_is_there():
    document = build.random_document(TASKS, methods=("nufilt", "sum"))
    drawings = {name: b"\x89PNG" + name.encode() for name in ("accuracy", "forecast", "losses", "affinity_mlp")}
    found = page(document, pictures=drawings)
    assert list(found.sections) == SECTIONS
    assert is_harmless(found)
    assert [name for name, text in found.sections.items() if "Not known" in text] == ["comparison"]
    shown = [value.split(",", 1)[1] for _, name, value in found.attributes if name == "src"]
    assert [base64.b64decode(value) for value in shown] == list(drawings.values())
    assert all(value for tag, name, value in found.attributes if (tag, name) == ("img", "alt"))
    assert found.tags.count("img") == len([1 for tag, name, _ in found.attributes if (tag, name) == ("img", "alt")])
    assert "viewport" in [value for _, name, value in found.attributes if name == "name"]


def test_numbers_are_those_of_the_document():
    document = build.random_document(TASKS)
    rows = page(document).rows
    accuracy = document["accuracy"]
    for task, values in zip(TASKS, accuracy["matrix"], strict=True):
        assert [task, *(f"{100 * x:.1f}" for x in values)] in rows
    assert ["lost by earlier tasks, points", "", *(f"{100 * x:.1f}" for x in accuracy["lost"][1:])] in rows
    steps = document["losses"]["methods"]["nufilt"]["relative"]
    wanted = [steps[group][name][1] for group in steps for name in ("stability", "plasticity", "harmonic")]
    assert ["cars", *(f"{x:.4f}" for x in wanted)] in rows
    means = [document["forecast"]["mean"][name][2] for name in document["forecast"]["mean"]]
    assert ["dtd", *(f"{x:.4f}" for x in means), "2"] in rows
    attention = document["affinity"]["groups"]["attention"]
    assert ["attention", f"{attention['own_mean']:.3f}", f"{attention['cross_mean']:.3f}"] in rows
    assert ["cars", "1.50", "0.25", "1.00"] in rows and ["write_model", "0.50"] in rows
    assert ["base", "models/base", "f00d", f"model.safetensors: {'ab' * 32}"] in rows
    assert ["filter_rank", "4"] in rows


def test_no_setting_is_told_without_a_value():
    recipe = build.recipe(TASKS)
    recipe = recipe._replace(settings={**recipe.settings, "adapter_out_rank": None})
    rows = page(build.empty_document(TASKS), recipe).rows
    assert ["layers", "the method's own choice"] in rows
    assert ["format", "the base's"] in rows and ["dtype", "the base's"] in rows
    assert "adapter_out_rank" not in [row[0] for row in rows]
    assert all(row[1] for row in rows if len(row) == 2)


def test_the_measures_are_explained_where_they_are_told():
    measured, unknown = (
        page(document).sections["verdict"] for document in (build.random_document(TASKS), build.empty_document(TASKS))
    )
    for word in ("ACC is the mean accuracy on all tasks", "BWT is how much the accuracy on earlier tasks changed"):
        assert word in measured and word not in unknown


def test_a_merge_of_which_nothing_is_known_says_so():
    reason = "images are <elsewhere>"
    found = page(build.empty_document(TASKS, {"losses": reason}))
    assert list(found.sections) == SECTIONS
    assert "Nothing was evaluated" in found.sections["verdict"]
    for name in SECTIONS[1:7]:
        assert "Not known: " in found.sections[name]
    assert f"Not known: {reason}." in found.sections["losses"]
    assert "img" not in found.tags and is_harmless(found)


def test_hostile_names_are_text():
    document = build.random_document(HOSTILE)
    recipe = build.recipe(HOSTILE)
    recipe = recipe._replace(
        inputs=[("base", HOSTILE[1], None, {}), *recipe.inputs[1:]],
        settings={**recipe.settings, "device": HOSTILE[1], HOSTILE[0]: HOSTILE[1]},
        steps=[(HOSTILE[0], 1.5, {HOSTILE[0]: 1.0}), *recipe.steps[1:]],
        timings={HOSTILE[1]: 2.0},
    )
    found = page(document, recipe)
    assert is_harmless(found)
    assert set(found.tags) <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "wbr", "section", "div"),
        *("table", "thead", "tbody", "tr", "th", "td"),
    }
    for name in HOSTILE:
        assert any(row[0] == name for row in found.rows)
        assert name in found.sections["recipe"]


def test_the_page_prints_and_fits_a_phone():
    content = report_page(build.empty_document(TASKS), build.recipe(TASKS), {})
    assert content.startswith("<!DOCTYPE html>") and '<html lang="en">' in content
    assert "@media print" in content and "prefers-color-scheme: dark" in content
    assert not re.search(r"url\(|@import|https?://", content)


def scores(name, values, bwt=None):
    return {"name": name, "accuracy": dict(zip(TASKS, values, strict=True)), "acc": float(np.mean(values)), "bwt": bwt}


def test_the_verdict_says_what_was_kept_lost_and_in_conflict():
    matrix = np.array([[0.9, 0.89, 0.895], [0.5, 0.8, 0.7], [0.4, 0.4, 0.6]])
    layers = {
        name: {"removed_share": share, "restored_share": 0.0, "drift": 0.0}
        for name, share in (("blocks.0.q", 0.2), ("blocks.1.q", 0.75), ("blocks.2.q", 0.5), ("blocks.3.q", 0.1))
    }
    forecast = [{"near_equal_cuts": [], "layers": rows} for rows in ({}, layers, layers)]
    how = {"tasks": TASKS, "method": "nufilt", "measured": None, "missing": {}}
    document = make_document(**how, forecast=forecast, accuracies=matrix)
    compared = [scores("pre-trained", [0.5] * 3), scores("individual", [0.9] * 3), scores("sum", [0.55] * 3, -0.2)]
    told = verdict(document, [*compared, scores("nufilt", matrix[:, -1], -0.05)])
    assert told == [
        "1 of 2 earlier tasks kept what they had when they were merged, within a point.",
        "Lost since, in points of accuracy: cars 10.0.",
        "ACC is 73.2 %, between 50.0 % of the pre-trained model and 90.0 % of each task's own model: 58 % of the way.",
        "The best other merge measured is sum, with 55.0 %.",
        "Most in conflict, by the share of a task's change that lies along directions of earlier tasks: "
        "blocks.1.q (75 %), blocks.2.q (50 %), blocks.0.q (20 %).",
    ]
    assert verdict(document)[:2] == told[:2] and len(verdict(document)) == 3
    for least, most, where in ((0.8, 0.9, "below"), (0.5, 0.6, "above")):
        ends = [scores("pre-trained", [least] * 3), scores("individual", [most] * 3)]
        assert f"ACC is 73.2 %, {where} both {100 * least:.1f} % of the pre-trained" in verdict(document, ends)[2]
    found = page(document, build.recipe(TASKS)._replace(compared=compared))
    assert ["sum", "55.0", "55.0", "55.0", "55.0", "-20.0"] in found.rows
    assert all(sentence in found.sections["verdict"] for sentence in verdict(document, compared))


def test_the_verdict_of_a_model_that_was_evaluated_once_merged():
    """Its scores are known, and what each task had when it was merged is not."""
    document = build.empty_document(TASKS)
    unknown = (
        "What was lost since each task was merged is not known: the same merge with --evaluate, into another folder, "
        "measures after every step."
    )
    own = scores("sum", [0.5, 0.6, 0.7])
    assert verdict(document, [own]) == ["ACC is 60.0 %.", unknown]
    ends = [scores("pre-trained", [0.5] * 3), scores("individual", [0.9] * 3)]
    told = (
        "ACC is 60.0 %, between 50.0 % of the pre-trained model and 90.0 % of each task's own model: 25 % of the way."
    )
    assert verdict(document, [*ends, own]) == [told, unknown]
    found = page(document, build.recipe(TASKS)._replace(compared=[own]))
    assert "ACC is 60.0 %." in found.sections["verdict"] and "Nothing was evaluated" not in found.sections["verdict"]
    why = "Not known: the model was not measured after each step (merge --evaluate)."
    assert why in found.sections["accuracy"]
    # Of one task nothing can be lost since; of a merge that was evaluated at its last step alone, nothing is known.
    assert verdict(build.empty_document(TASKS[:1]), [own]) == ["ACC is 60.0 %."]
    matrix = np.full((3, 3), np.nan)
    matrix[:, -1] = list(own["accuracy"].values())
    how = {"tasks": TASKS, "method": "sum", "forecast": [], "measured": None, "missing": {}}
    assert verdict(make_document(**how, accuracies=matrix), [own]) == ["ACC is 60.0 %.", unknown]


def test_scores_of_some_examples_are_told_as_such():
    how = {"tasks": TASKS, "method": "sum", "forecast": [], "measured": None, "missing": {}}
    document = make_document(**how, accuracies=np.full((3, 3), 0.5), limit=3)
    found = page(document, build.recipe(TASKS)._replace(compared=[scores("sum", [0.5] * 3, 0.0)]))
    heads = [row[0] for row in found.rows if row[0].startswith("test accuracy")]
    assert heads == ["test accuracy of at most 3 examples, %"] * 2
    assert "All scores are of at most 3 examples of each task." in found.sections["verdict"]
    content = report_page(document, build.recipe(TASKS), {})
    assert "ACC 50.0&nbsp;%, BWT +0.0 points, of at most 3 examples of each task." in content
    whole = report_page(make_document(**how, accuracies=np.full((3, 3), 0.5)), build.recipe(TASKS), {})
    assert "at most" not in whole and "BWT +0.0 points." in whole


def test_arrays_survive_json():
    x = np.array([[1.5, np.nan], [np.nan, -2.0]])
    assert as_json(x) == [[1.5, None], [None, -2.0]]
    np.testing.assert_array_equal(as_array(as_json(x)), x)


def test_checks_of_the_forecast():
    """The document finds what was put into it: a forecast that orders layers as the losses do."""
    measured = build.random_measured(3)
    share = layer_stability(relative(measured.losses["nufilt"]))
    forecast = [
        {
            "near_equal_cuts": [],
            "layers": {
                name: {"drift": float(share[step, k]), "removed_share": 0.5, "restored_share": -float(share[step, k])}
                for k, name in enumerate(measured.merged_layers)
            }
            if step
            else {},
        }
        for step in range(3)
    ]
    how = {"tasks": TASKS, "method": "nufilt", "forecast": forecast, "missing": {}}
    # Accuracy is lost where the mean drift is: what one column has less than the one before.
    drift = share[1:].mean(axis=1)
    accuracies = np.array([[1, 1 - drift[0], 1 - drift.sum()], [0, 1, 1 - drift[1]], [0, 0, 1]])
    check = make_document(**how, accuracies=accuracies, measured=measured)["forecast_check"]
    assert check["drift_and_stability"]["pooled"] == pytest.approx(1)
    assert check["added_share_and_stability"]["by_step"] == pytest.approx([None, -1, -1])
    assert "removed_share_and_plasticity" not in check  # it is the same everywhere: no order to compare
    assert "drift_and_accuracy_lost" not in check  # two steps are too few
    assert make_document(**how, accuracies=None, measured=None)["forecast_check"] is None


def test_an_unmeasured_accuracy_has_no_scores():
    document = build.empty_document(TASKS)
    assert document["accuracy"] is None
    matrix = np.array([[0.9, 0.8], [np.nan, 0.7]])
    how = {"tasks": TASKS[:2], "method": "sum", "forecast": [], "measured": None, "missing": {}}
    found = make_document(**how, accuracies=matrix)["accuracy"]
    assert found["acc"] == pytest.approx(0.75) and found["bwt"] == pytest.approx(-0.1)
    matrix[0, 1] = np.nan
    found = make_document(**how, accuracies=matrix)["accuracy"]
    assert (found["acc"], found["bwt"]) == (None, None)
    assert found["matrix"] == [[0.9, None], [None, 0.7]]
