"""Documents of an output folder that hold something else than they may."""

import copy
import json

import pytest

from nufilt_jax import methods
from nufilt_jax.errors import OutputError
from nufilt_jax.output.recipe import Model, Recipe, Settings, Step

MODEL = Model("base", "base", None, {"file": "0" * 64})
SETTINGS = Settings(method="sum", config=methods.find("sum").config())
RECIPE = Recipe(
    base=MODEL, tasks=(Model("a", "a", None, {"file": "1" * 64}),), settings=SETTINGS, steps=(Step(task="a"),)
).to_json()


def read(document, folder):
    return Recipe.from_json(document, folder, lambda method: methods.find(method).config)


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("base.sha256.file", "x" * 99, f"base.sha256.file is '{'x' * 79}..."),
        ("tasks.0.source", 3, "tasks[0].source is 3"),
        ("steps.0.losses", [1.0, "x"], "losses[1] is 'x'"),
        ("steps.0.timings", "x", "timings is 'x'"),
        ("seed", True, "seed is True"),
        ("layers", [], "layers is []"),
        ("steps.0.task", "b", "its steps are not those of its tasks"),
        ("recipe_version", 99, "it is of version 99"),
    ],
)
def test_a_recipe_of_other_kinds_is_refused(tmp_path, path, value, what):
    document = copy.deepcopy(json.loads(json.dumps(RECIPE)))
    assert read(document, tmp_path).to_json() == RECIPE
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    node = document
    for key in parents:
        node = node[key]
    node[last] = value
    with pytest.raises(OutputError) as error:
        read(document, tmp_path)
    assert what in str(error.value)
