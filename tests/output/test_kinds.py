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
        ("memory", {"allowed": 1, "by": "x", "planned": "x"}, "memory.planned is 'x'"),
        ("compiled", {"seconds": 1.0}, "compiled.programs is None"),
        ("left", [{"pattern": "x", "kinds": 1, "layers": 1, "share": {"a": "x"}}], "left[0].share is {'a': 'x'}"),
        ("adapter", {"modules": {"x": 1}, "config": {}}, "adapter.modules.x is 1"),
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


def test_what_was_told_comes_back(tmp_path):
    """And of what another version tells, what is known here."""
    told = {
        "selected": [{"pattern": "*.q", "kinds": 1, "layers": 2, "parameters": 8}],
        "left": [{"pattern": "*.b", "kinds": 1, "layers": 2, "parameters": 4, "share": {"a": 0.5}}],
        "windows": [{"layers": 2, "bytes": 32, "tasks": 1}],
        "host": {"machine": "x86_64", "layers_at_once": 2, "tolerance": {"update": 2e-5}, "is_mixed": True},
        "compiled": {"programs": 3, "from_cache": 1, "seconds": 0.5},
        "memory": {"allowed": 8, "by": "--max-memory", "planned": 6, "peak": 5},
        "adapter": {"modules": {"q": "m.q"}, "config": {}, "rank": 2, "energy_lost": 0.0},
    }
    newer = copy.deepcopy(told)
    newer["host"]["moon"] = newer["windows"][0]["moon"] = "full"
    assert read(RECIPE | newer, tmp_path).to_json() == RECIPE | told
