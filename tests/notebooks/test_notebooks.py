"""The notebooks: text and .ipynb agree, they run, and what is committed shows pictures and nothing of one machine."""

import base64
import re
import sys

import jupytext
import make_notebooks
import nbformat
import pytest

from nufilt_jax.commands.arguments import Arguments
from nufilt_jax.commands.request import check_usage, new_job
from nufilt_jax.presets import CLIP_BASES, FLAN_T5, LLAVA, MODELS, TINY

N_PICTURES = {"merge_and_evaluate": 2, "merge_your_own": 1, "merge_lora": 2, "subspace_alignment": 4}
PRESETS = {
    "merge_and_evaluate": [name for name in MODELS if name != LLAVA],
    "merge_lora": [TINY, *CLIP_BASES],
    "subspace_alignment": [TINY, *CLIP_BASES],  # affinities are of CLIP's vision towers
}
MOST_BYTES = 600_000

each = pytest.mark.parametrize("name", make_notebooks.NAMES)


def text(name):
    return (make_notebooks.HERE / f"{name}.py").read_text(encoding="utf-8")


def committed(name):
    return nbformat.read(make_notebooks.HERE / f"{name}.ipynb", as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook):
    found = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [base64.b64decode(picture) for picture in found]


def sources(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@each
def test_both_forms_have_the_same_cells(name):
    assert sources(committed(name)) == sources(jupytext.reads(text(name), fmt="py:percent"))


@each
def test_it_runs_with_few_images(name, tmp_path):
    notebook = make_notebooks.execute(name, tmp_path, is_fast=True)
    assert len(pictures(notebook)) == N_PICTURES[name]
    assert [output.text for output in outputs(notebook) if output.get("name") == "stderr"] == []
    assert "same weights: False" not in str(outputs(notebook))


@each
def test_the_committed_pictures_are_there(name):
    found = pictures(committed(name))
    assert len(found) == N_PICTURES[name]
    assert all(picture.startswith(b"\x89PNG") for picture in found)
    assert (make_notebooks.HERE / f"{name}.ipynb").stat().st_size < MOST_BYTES


@each
def test_the_committed_outputs_know_nothing_of_one_machine(name):
    told = [output for output in outputs(committed(name)) if output.get("name") == "stderr"]
    assert told == []
    words = nbformat.writes(committed(name))
    assert re.findall(r"(?<![\w.}/:])/(?:home|root|work|tmp|Users|mnt|opt|usr|var|data)/[\w.-]+", words) == []
    assert sys.prefix not in words


@pytest.mark.parametrize("name", PRESETS)
def test_one_variable_names_the_model(name):
    [(chosen, others)] = re.findall(r'^MODEL = "(.*)"  # or: (.*)$', text(name), re.MULTILINE)
    assert [chosen, *others.split()] == PRESETS[name]
    assert not re.search(r'"--model", (?!MODEL\b)', text(name))


@pytest.mark.parametrize("model", [*CLIP_BASES, FLAN_T5])
@pytest.mark.parametrize("method", ["nufilt", "opcm", "task_arithmetic", "sum"])
def test_the_command_line_takes_the_notebooks_arguments(model, method):
    arguments = Arguments(model=model, method=method, evaluate=True, limit=500)
    check_usage(arguments)
    assert new_job(arguments).problems == ()
