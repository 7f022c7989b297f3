"""The configuration file: what it may say, what wins over it, and the merges that it repeats."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import model_builders as build
import pytest

from nufilt_jax.commands.arguments import Arguments
from nufilt_jax.commands.config_file import NOT_IN_FILES, read_options
from nufilt_jax.commands.init import shown_default, template
from nufilt_jax.errors import ConfigError

FILES = {
    "merge.toml": """
base = "base"
out = "out"
filter_rank = 4
adapter_rank = 2
method_args = {task_rank = 2, steps = 4, ridge = 2.0}
[tasks]
beta = "./beta"
alpha = "alpha"
""",
    "merge.yaml": """
base: base
out: out
filter_rank: 4
adapter_rank: 2
learning_rate: 1e-3
tasks: {beta: ./beta, alpha: alpha}
method_args:
  task_rank: 2
  steps: 4
  ridge: 2.0
""",
    "merge.json": json.dumps(
        {
            "base": "base",
            "out": "out",
            "filter_rank": 4,
            "adapter_rank": 2,
            "limit": None,
            "tasks": {"beta": "./beta", "alpha": "alpha"},
            "method_args": ["task_rank=2", "steps=4", "ridge=2.0"],
        }
    ),
}


@pytest.fixture
def written(models):
    """Writes a file beside the models."""

    def write(name, text):
        (models / name).write_text(text)
        return models / name

    return write


@pytest.mark.parametrize("key", ["task", "tasks"])
def test_a_list_of_tasks_is_found_from_the_file_too(key, written, models):
    text = f'base = "base"\n{key} = ["beta=./beta", "alpha=alpha", "hub=someone/model", "bare"]'
    assert read_options(written("merge.toml", text))["task"] == (
        [f"beta={models / 'beta'}", f"alpha={models / 'alpha'}", "hub=someone/model", "bare"]
    )
    (models / "own.toml").write_text(f'{key} = ["alpha"]')
    assert read_options(models / "own.toml", "evaluate") == {"task": ["alpha"]}


@pytest.mark.parametrize("size", ["2000000000", "2e9", '"2GB"'])
def test_memory_may_be_a_number_of_bytes(size, written, nufilt):
    text = f'base = "base"\nmethod = "sum"\nmax_memory = {size}\n[tasks]\nalpha = "alpha"\n'
    result = nufilt("plan", "--config", written("merge.toml", text), "--json")
    assert result.code == 0, result.err
    assert result.json["memory"]["allowed"] == 2_000_000_000


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_the_command(name, written, models, tmp_path, nufilt, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = nufilt("merge", "--config", written(name, FILES[name]), "--json")
    assert result.code == 0, result.err
    assert [task["name"] for task in result.json["tasks"]] == ["beta", "alpha"]
    assert result.json["config"]["ridge"] == 2.0
    by_hand = command(models, tmp_path / "hand", "--method-args", "ridge=2.0", tasks=("beta", "alpha"))
    assert nufilt(*by_hand).code == 0
    assert build.weight_bytes(models / "out") == build.weight_bytes(tmp_path / "hand")


def test_the_command_line_wins(written, models, tmp_path, nufilt):
    path = written("merge.toml", FILES["merge.toml"])
    argv = ("plan", "--config", path, "--out", tmp_path / "else", "--steps", "7", "--task", f"gamma={models / 'gamma'}")
    plan = nufilt(*argv, "--json").json
    assert (plan["config"]["steps"], plan["config"]["filter_rank"], plan["config"]["ridge"]) == (7, 4, 2.0)
    assert (plan["out"], [task["name"] for task in plan["tasks"]]) == (str(tmp_path / "else"), ["gamma"])


BAD = {
    "unknown key": (
        'filter_rnk = 3\nplan = true\nprocesses = 2\n[tasks]\na = "b"',
        [
            "filter_rnk: is no option (did you mean fil",
            "plan: belongs to one run: it is for the command line alone (say --plan there)",
            "processes: belongs to one run",
        ],
    ),
    "wrong types": (
        'filter_rank = 1.5\nconv = "yes"\nbase = 3\nlearning_rate = "fast"\nmethod_args = 3\ntasks = 4',
        [
            "filter_rank: must be a whole number, got 1.5",
            "conv: must be true or false, got 'yes'",
            "base: must be a text, got 3",
            "learning_rate: must be a number, got 'fast'",
            "method_args: must be a table of settings, got 3",
            "tasks: must be a table NAME = MODEL, in order, got 4",
        ],
    ),
    "twice": ('task = ["a=b"]\n[tasks]\na = "b"', ["task: says the same as the table tasks"]),
    "no toml": ("base = ", ["is not TOML: "]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_file_may_not_say(case, written, refused):
    text, expected = BAD[case]
    path = written("merge.toml", text)
    lines = refused("merge", "--config", path)
    assert len(lines) == len(expected)
    assert all(line.startswith(f"nufilt: {path}: {what}") for line, what in zip(lines, expected, strict=True)), lines


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("merge.yaml", "base: x\nbase: y", "has the key 'base' twice"),
        ("merge.yaml", "!!python/object/apply:os.system [ls]", "is not YAML: could not determine a constructor"),
        ("merge.yaml", "- a", "holds no table of options"),
        ("merge.yaml", "? [a]\n: x", "has a key that is no text"),
        ("merge.json", '{"base": "x", "base": "y"}', "has the key 'base' twice"),
        ("merge.ini", "", "is no configuration file"),
        ("missing.toml", None, "there is no such file"),
    ],
)
def test_files_that_are_refused(name, text, expected, models, refused):
    path = models / name
    if text is not None:
        path.write_text(text)
    (line,) = refused("plan", "--config", path)
    assert line.startswith(f"nufilt: {path}: {expected}")


def test_a_recipe_repeats_its_merge(models, tmp_path, nufilt, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = (
        "--seed",
        "5",
        "--other-params",
        "first",
        "--solver",
        "closed_form",
        "--method-args",
        "first_task=authors",
    )
    assert nufilt(*command(models, tmp_path / "one", *options, n=2)).code == 0
    recipe = (tmp_path / "one" / "nufilt.json").read_text()
    assert str(tmp_path) not in recipe and json.loads(recipe)["base"]["source"] == "../models/base"
    again = nufilt("merge", "--config", "one/nufilt.json")
    assert (again.code, "no effect" in again.err) == (0, False), again.err
    assert build.weight_bytes(tmp_path / "one-again") == build.weight_bytes(tmp_path / "one")
    first = json.loads(recipe)
    del first["recipe_version"]  # as in the first version
    (tmp_path / "one" / "first.json").write_text(json.dumps(first))
    again = nufilt("merge", "--config", "one/first.json", "--out", "first")
    assert again.code == 0, again.err
    assert build.weight_bytes(tmp_path / "first") == build.weight_bytes(tmp_path / "one")
    shutil.rmtree(models / "beta")
    build.write(models / "beta", build.weights(models / "alpha"))
    changed = nufilt("merge", "--config", "one/nufilt.json", "--out", "two")
    assert changed.code == 1 and "beta: has changed since the merge that --config repeats" in changed.err


def test_settings_of_the_command_line_leave_the_files_others(models, tmp_path, nufilt, command, written):
    """Of a recipe and of a table alike; another method has settings of its own."""
    ties = ("--method", "ties", "--method-args", "density=0.3", "--method-args", "scale=0.7")
    assert nufilt(*command(models, tmp_path / "ties", *ties, n=2)).code == 0
    table = 'base = "base"\nmethod = "ties"\nout = "x"\n[method_args]\ndensity = 0.3\nscale = 0.7\n'
    tasks = '[tasks]\nalpha = "./alpha"\nbeta = "./beta"\n'
    for number, file in enumerate((tmp_path / "ties" / "nufilt.json", written("merge.toml", table + tasks))):
        how = ("--config", file, "--out", tmp_path / f"again-{number}", "--json", "--method-args")
        again = nufilt("merge", *how, "scale=0.5")
        assert again.code == 0, again.err
        config = again.json["config"]
        assert (config["density"], config["scale"]) == (0.3, 0.5)
        other = nufilt("merge", *how[:3], tmp_path / f"other-{number}", *how[4:], "alpha=0.5", "--method", "opcm")
        assert other.code == 0 and other.json["config"]["alpha"] == 0.5, other.err


def test_a_method_of_the_command_line_leaves_the_files_settings(models, tmp_path, nufilt, command, written):
    """They are another's: of a recipe, of a table and of a mergekit file alike, and the run says so."""
    options = ("--solver", "closed_form", "--method-args", "first_task=authors")
    assert nufilt(*command(models, tmp_path / "one", *options, n=2)).code == 0
    table = 'base = "base"\nout = "x"\n[method_args]\nfirst-task = "authors"\n[tasks]\nalpha = "./alpha"\n'
    for file, left_out in (
        (tmp_path / "one" / "nufilt.json", "first_task"),
        (written("merge.toml", table), "first_task"),
        (written("kit.yml", MERGEKIT["task_arithmetic"][0]), "scale"),
    ):
        for method in ("sum", "weight_average"):
            plan = nufilt("plan", "--config", file, "--out", tmp_path / "out", "--method", method, "--json")
            assert (plan.code, plan.json["method"]) == (0, method), plan.err
            [told] = [line for line in plan.json["warnings"] if line.startswith("--config: no effect: ")]
            assert left_out in told and told.endswith(f": {method} is not the method of the file")
    same = nufilt("plan", "--config", tmp_path / "one" / "nufilt.json", "--method", "nufilt", "--json")
    assert (same.json["config"]["first_task"], same.json["warnings"]) == ("authors", [])


@pytest.mark.parametrize("settings", ["{filter_rank = 8, ridge = 2.0}", '["filter-rank=8", "ridge=2.0"]'])
def test_an_option_wins_over_the_files_settings_however_they_are_spelt(settings, written, nufilt):
    text = f'base = "base"\nout = "x"\nmethod_args = {settings}\n[tasks]\nalpha = "alpha"\nbeta = "beta"\n'
    file = written("merge.toml", text)
    for options, rank in (((), 8), (("--filter-rank", "6"), 6)):
        plan = nufilt("plan", "--config", file, "--json", *options)
        assert plan.code == 0, plan.err
        assert (plan.json["config"]["filter_rank"], plan.json["config"]["ridge"]) == (rank, 2.0)


def test_card_and_recipe_tell_of_no_home(models, tmp_path, nufilt, command, monkeypatch):
    monkeypatch.setenv("HOME", str(models))
    assert nufilt(*command(models, tmp_path / "out", "--method", "sum", n=2)).code == 0
    for name in ("nufilt.json", "README.md"):
        text = (tmp_path / "out" / name).read_text()
        assert str(models) not in text and "~/alpha" in text
    again = nufilt("add", tmp_path / "out", "--task", f"gamma={models / 'gamma'}", "--json")
    assert again.code == 0 and again.json["tasks"][0]["source"] == str(models / "alpha")


def test_evaluate_takes_what_is_its_own(tmp_path):
    (tmp_path / "tasks.json").write_text("{}")
    (tmp_path / "merge.toml").write_text(
        'base = "b"\nlimit = 5\ndtype = "bfloat16"\ntasks_file = "t.json"\n[tasks]\na = "x"'
    )
    assert read_options(tmp_path / "merge.toml", "evaluate") == {
        "task": ["a"],
        "limit": 5,
        "tasks_file": str(tmp_path / "t.json"),
    }
    (tmp_path / "own.toml").write_text('dtype = "bfloat16"\ntask = ["a"]')
    assert read_options(tmp_path / "own.toml", "evaluate") == {"dtype": "bfloat16", "task": ["a"]}


def test_what_is_for_the_command_line_alone_is_told():
    page = (Path(__file__).parents[2] / "docs" / "how_to" / "config_file.md").read_text(encoding="utf-8")
    [listed] = re.findall(r"What belongs to one run stays on the command line: ([^.]+)\.", page)
    assert set(re.findall(r"`(\w+)`", listed)) == set(NOT_IN_FILES)


def test_init_writes_a_file_of_all_options(tmp_path, nufilt, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert nufilt("init").code == 0
    options = read_options(tmp_path / "merge.toml")
    assert options["base"] and len(options["task"]) == 2
    again = nufilt("init")
    assert again.code == 1 and "merge.toml: is there already: nothing is overwritten" in again.err
    other = nufilt("init", "merge.yaml")
    assert other.code == 1 and "merge.yaml: must end with .toml" in other.err
    told = [
        line.split()[1]
        for line in template().splitlines()
        if line.startswith("# ") and " = " in line and "NAME" not in line
    ]
    hidden = {"base", "out", "task", "method_args", *NOT_IN_FILES}
    assert set(told) == {name for name in Arguments.__annotations__ if name not in hidden}
    for line in template().splitlines():
        if line.startswith("# ") and line.split()[1] in told and " = " in line:
            (tmp_path / "one.toml").write_text(line[2:])
            read_options(tmp_path / "one.toml")


def test_what_init_writes_is_the_default_or_says_that_it_is_an_example():
    """Whoever takes away a # gets what stood without it, or reads that it is something else."""
    lines = [line[2:] for line in template().splitlines() if re.match(r"# \w+ = ", line)]
    for line in lines:
        [(key, value)] = tomllib.loads(line).items()
        told = shown_default(Arguments.__annotations__[key])
        if " # an example: " in line:
            assert line.endswith(f"the default is {told}" if told else "there is no default")
        else:
            assert value is False if told == "" else str(value) == told or float(value) == float(told)
        assert value != ""
    sentences = re.findall(r"^# (.+)$", template(), re.MULTILINE)
    assert not [text for text in sentences if text.startswith("Of ")]


@pytest.mark.parametrize("name", ["layers", "model", "order", "heads_from", "method", "output"])
def test_an_empty_text_is_no_value(name, written, models, tmp_path, refused):
    base, tasks = f'base = "{models}/base"\n', f'[tasks]\na = "{models}/alpha"\n'
    path = written("merge.toml", ("" if name == "model" else base) + f'out = "{tmp_path}/out"\n{name} = ""\n' + tasks)
    lines = refused("merge", "--config", path, code=2)
    assert f"nufilt: --{name.replace('_', '-')}: is empty (leave it out)" in lines


MERGEKIT = {
    "linear": (
        "merge_method: linear\nmodels:\n- model: alpha\n  parameters: {weight: 0.5}\n"
        "- model: beta\n  parameters: {weight: 0.5}\ndtype: float32\n",
        "weight_average",
        {},
        {"alpha": 0.5, "beta": 0.5},
    ),
    "task_arithmetic": (
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n- model: base\n- model: alpha\n- model: beta\n"
        "parameters: {weight: 0.5, lambda: 0.8, normalize: false, int8_mask: true}\ntokenizer_source: base\n",
        "task_arithmetic",
        {"scale": 0.4},
        {"base": 0.2, "alpha": 0.4, "beta": 0.4},
    ),
    "normalised": (
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n- model: alpha\n- model: beta\n"
        "parameters: {weight: 3, normalize: true}\n",
        "task_arithmetic",
        {"scale": 0.5},
        {"alpha": 0.5, "beta": 0.5},
    ),
    "ties": (
        "merge_method: ties\nbase_model: base\nmodels:\n- model: alpha\nparameters: {density: 1, lambda: 0.5}\n",
        "ties",
        {"scale": 0.5},
        {"base": 0.5, "alpha": 0.5},
    ),
}


@pytest.mark.parametrize("case", MERGEKIT)
def test_a_mergekit_file_that_means_the_same(case, written, models, tmp_path, nufilt):
    text, method, settings, shares = MERGEKIT[case]
    result = nufilt("merge", "--config", written("kit.yml", text), "--out", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert result.json["method"] == method
    assert {key: result.json["config"][key] for key in settings} == pytest.approx(settings)
    merged, parts = build.weights(tmp_path / "out"), {name: build.weights(models / name) for name in shares}
    expected = sum(share * parts[name][build.Q0].astype("f8") for name, share in shares.items())
    assert abs(merged[build.Q0] - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("merge_method: slerp\nbase_model: base", ["merge_method", "models"]),
        ("merge_method: task_arithmetic\nmodels:\n- model: alpha", ["base_model"]),
        ("merge_method: linear\nslices: []\nmodels: 3", ["slices", "models"]),
        ("merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b}\n", []),
        ("merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 2}}\n- {model: b}\n", ["models"]),
        (
            "merge_method: linear\nparameters: {normalize: false}\nmodels:\n- model: a\n- model: b\n",
            ["parameters.normalize"],
        ),
        (
            "merge_method: ties\nbase_model: base\nmodels:\n- {model: a, parameters: {density: 0.5}}\n- model: b\n"
            "  parameters: {density: 0.5}\n",
            ["density", "merge_method"],
        ),
        (
            "merge_method: task_arithmetic\nbase_model: base\ntokenizer_source: union\nmodels:\n"
            "- {model: a, parameters: {weight: [0, 1]}}\n",
            ["tokenizer_source", "models[0].parameters.weight"],
        ),
        (
            "merge_method: slerp\nbase_model: base\nzork: 1\ntokenizer_source: union\nparameters: {t: 0.5}\n"
            "models: [{model: a}]\n",
            ["merge_method", "zork", "tokenizer_source"],
        ),
        (
            "merge_method: ties\nbase_model: base\ntokenizer_source: union\nparameters: {int8_mask: 1, weight: []}\n"
            "models: [{model: a, parameters: 3}, {model: b, parameters: {t: 1}}]\n",
            [
                "tokenizer_source",
                "parameters.int8_mask",
                "parameters.weight",
                "models[0].parameters",
                "models[1].parameters.t",
                "merge_method",
            ],
        ),
    ],
)
def test_a_mergekit_file_that_means_something_else(text, keys, tmp_path):
    (tmp_path / "kit.yaml").write_text(text)
    if not keys:
        assert read_options(tmp_path / "kit.yaml")["method"] == "weight_average"
        return
    with pytest.raises(ConfigError) as error:
        read_options(tmp_path / "kit.yaml")
    assert [found.tensor for found in error.value.problems] == keys
