"""The tasks that come with the package, and a user's own."""

import json

import pytest

from nufilt_jax.errors import ConfigError
from nufilt_jax.evaluation.specs import ImageSpec, load_specs
from nufilt_jax.evaluation.suite import spec_problems
from nufilt_jax.presets import TASKS

# Table 6 of the paper lists the tasks; these are the class counts of the data sets' own papers.
N_CLASSES = (397, 196, 45, 10, 10, 43, 10, 47, 102, 2, 7, 37, 10, 100, 10, 101, 10, 26, 10, 2)
MINE = {"kind": "image", "dataset": "me/mine", "split": "test", "templates": ["a {}."], "class_names": ["x", "y"]}


def written(folder, document):
    path = folder / "mine.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_every_task_of_the_paper_is_described():
    specs = load_specs()
    for name, n_classes in zip(TASKS, N_CLASSES, strict=True):
        spec = specs[name]
        assert isinstance(spec, ImageSpec)
        assert spec.class_names is not None
        assert len(spec.class_names) == n_classes
        assert spec.dataset.count("/") == 1
        assert spec.split == ("validation" if name == "food101" else "test")
    assert len(set(spec.dataset for spec in specs.values() if isinstance(spec, ImageSpec))) == len(TASKS)


def test_prompts_are_the_checkpoints_authors():
    specs = load_specs()
    assert specs["mnist"].templates == specs["svhn"].templates == ('a photo of the number: "{}".',)
    assert [len(specs[name].templates) for name in TASKS[:8]] == [2, 8, 18, 3, 1, 3, 1, 8]
    assert len(specs["cifar100"].templates) == 18
    assert specs["gtsrb"].class_names[14] == "stop"
    assert specs["kmnist"].class_names[:2] == ("お", "き")
    assert (specs["fer2013"].image, specs["fer2013"].label, specs["svhn"].config) == ("jpg", "cls", "cropped_digits")


def test_a_user_adds_and_replaces(tmp_path):
    path = written(tmp_path, {"mine": MINE, "dtd": MINE | {"dataset": "./data", "config": None, "revision": "v1"}})
    specs = load_specs(path)
    assert len(specs) == len(load_specs()) + 1
    assert specs["mine"] == ImageSpec(dataset="me/mine", split="test", templates=("a {}.",), class_names=("x", "y"))
    assert (specs["dtd"].dataset, specs["dtd"].revision) == (str(tmp_path / "data"), "v1")
    assert specs["dtd"].image == "image"


@pytest.mark.parametrize(("given", "found"), [("../sets/a", "sets/a"), ("./a", "own/a")])
def test_folders_count_from_the_file(tmp_path, given, found):
    (tmp_path / "own").mkdir()
    path = written(tmp_path / "own", {"mine": MINE | {"dataset": given}})
    assert load_specs(path)["mine"].dataset == str(tmp_path / found)


def test_everything_wrong_is_listed_at_once(tmp_path):
    document = {
        "a": MINE | {"kind": "sound"},
        "b": "tanganke/dtd",
        "c": MINE | {"template": ["{}"], "split": 3, "templates": "a {}."},
        "d": {"kind": "image", "dataset": "", "split": "test"},
        "e": MINE | {"templates": ["no name", "{}"], "class_names": ["x", "x"]},
        "f": MINE,
        "g": MINE | {"templates": []},
        "h": MINE | {"label": None, "config": ["a"]},
    }
    path = written(tmp_path, document)
    with pytest.raises(ConfigError) as caught:
        load_specs(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    wanted = [
        "a: must be an object whose 'kind' is one of image, text",
        "b: must be an object",
        "c.template: is no key of a task of kind 'image', which has dataset, split, templates",
        "c.split: must be a text, got 3",
        'c.templates: must be a list of texts, got "a {}."',
        'd.dataset: must be a text, got ""',
        "d.templates: is missing",
        "e.templates: must be one or more texts with one {} each",
        "e.class_names: must be two or more different texts",
        "g.templates: must be one or more",
        "h.label: must be a text, got null",
        'h.config: must be a text or null, got ["a"]',
    ]
    assert len(lines) == len(wanted)
    for part in wanted:
        assert sum(f"{path}: {part}" in line for line in lines) == 1, part


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[1]", "is not a JSON object"), ('{"a": NaN}', "NaN")]
)
def test_files_that_are_no_tasks(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_specs(written(tmp_path, text))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_specs(tmp_path / "none.json")


def test_a_model_that_nothing_here_evaluates():
    [problem] = spec_problems(["cars"], {}, {"model_type": "llama"})
    assert problem.what == "a model of type 'llama' cannot be evaluated"
