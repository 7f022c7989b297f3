"""The pages of the documentation against the program."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import nufilt_jax as nj
from nufilt_jax import errors

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


def test_every_public_name_has_its_place():
    told = set(re.findall(r"\.\. auto(?:function|class|module):: nufilt_jax\.([\w.]+)", page("api.md")))
    assert set(nj.__all__) <= told
    assert all(
        f"models.{name}" in told for name in ("clip_image_features", "clip_text_features", "t5_logits", "t5_generate")
    )


def test_every_error_is_explained():
    kinds = [kind.__name__ for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    headings = re.findall(r"^## (\w+)$", page("errors.md"), re.MULTILINE)
    assert sorted(headings) == sorted(kinds)


def told_messages():
    """The messages on the page of errors, each as its parts between what differs."""
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]+ \|$", page("errors.md"), re.MULTILINE)
    return [
        [part.strip() for part in row.split("...") if part.strip()] for row in rows if row not in ("message", "---")
    ]


def test_messages_on_the_page_of_errors_are_those_of_the_program():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nufilt_jax").rglob("*.py"))
    messages = told_messages()
    assert len(messages) > 20
    for message in messages:
        assert all(part in source for part in message), message


def test_every_message_is_on_the_page_of_errors():
    import test_messages

    told, missing = told_messages(), {}
    for place, parts in test_messages.sentences():
        said = "...".join(parts)
        is_alone = any(character.isalpha() for character in said)  # others are put together elsewhere
        if is_alone and not any(all(part in said for part in message) for message in told):
            missing[place] = said
    assert missing == {}


def test_links_between_pages_lead_somewhere():
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    for path in [*pages, *PAGES]:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
        for target in re.findall(r"\{doc\}`([^`]+)`", text):
            assert (path.parent / f"{target}.md").exists(), f"{path.name}: {target}"


def test_every_page_is_in_the_contents():
    listed = set(re.findall(r"^((?:how_to/|notebooks/)?\w+)$", page("index.md"), re.MULTILINE))
    there = {path.relative_to(DOCS).with_suffix("").as_posix() for path in PAGES} - {"index"}
    assert there <= listed
    notebooks = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert listed - there == notebooks


def test_extras_are_told():
    told = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]+) \|", page("get_started.md"), re.MULTILINE))))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras.keys() == told


def test_the_picture_is_drawn_from_the_results():
    from benchmarks.study.door_picture import PICTURE, STUDY, picture

    assert PICTURE.read_text(encoding="utf-8") == picture(json.loads(STUDY.read_text()))
    assert "prefers-color-scheme:dark" in PICTURE.read_text(encoding="utf-8")


def test_an_example_of_a_configuration_file_is_one(tmp_path):
    from nufilt_jax.commands.config_file import read_options

    [example] = re.findall(r"```toml\n(base.*?)```", page("how_to/config_file.md"), re.DOTALL)
    (tmp_path / "merge.toml").write_text(example)
    assert len(read_options(tmp_path / "merge.toml")["task"]) == 2


def test_an_example_of_a_task_is_one(tmp_path):
    from nufilt_jax.evaluation.specs import load_specs

    [example] = re.findall(r"```json\n(.*?)```", page("how_to/evaluate.md"), re.DOTALL)
    (tmp_path / "tasks.json").write_text(example)
    assert load_specs(tmp_path / "tasks.json")["birds"].class_names == ("robin", "wren")


def test_what_null_space_forgets_is_told_as_measured():
    results = ROOT / "benchmarks" / "results"

    def row(name, title):
        [found] = [one for one in json.loads((results / name).read_text())["tables"] if one["title"].startswith(title)]
        return next(row for row in found["rows"] if row[0] == "null_space")

    mild, hard = row("study.json", "Table 4")[2].split()[0], row("fine_tuning_study.json", "The study")[-1].split()[-1]
    assert f"BWT of {mild} in the study ({hard} after hard" in page("how_to/choose.md")


def test_models_are_named_as_the_page_of_the_output_folder_tells(monkeypatch):
    from nufilt_jax.output.model import seen_from

    monkeypatch.setenv("HOME", "/home/user")
    out = Path("/models/merged")
    places = ("/models/cars", "/models/merged/cars", "/home/user/.cache/nufilt_jax/tiny/base")
    for place, named in zip(places, ("../cars", "./cars", "~/.cache/nufilt_jax/tiny/base"), strict=True):
        assert seen_from(place, out) == named and f"`{named}`" in page("output_folder.md")
    assert seen_from(places[-1], Path("/home/user/merged")) == "../.cache/nufilt_jax/tiny/base"


def test_usages_on_the_page_of_the_command_line_are_those_of_the_command(tmp_path):
    """Made as Sphinx makes them, by a module of its name."""
    (tmp_path / "sphinx").mkdir()
    (tmp_path / "sphinx" / "__main__.py").write_text(
        f"""
conf = {{"__file__": {str(DOCS / "conf.py")!r}}}
exec(open(conf["__file__"], encoding="utf-8").read(), conf)
from cyclopts.docs.rst import generate_rst_docs
from nufilt_jax.commands.app import app
print(conf["smartquotes_action"], conf["html_math_renderer"])
print(generate_rst_docs(app, no_root_title=True))
"""
    )
    found = subprocess.run(
        [sys.executable, "-m", "sphinx"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    told, pages = found.split("\n", 1)
    action, equations = told.split()
    assert "d" not in action.lower() and equations != "mathjax"  # which comes from the network
    usages = re.findall(r"^::\n\n    (.*)$", pages, re.MULTILINE)
    assert "nufilt merge [OPTIONS]" in usages and "nufilt add [OPTIONS] FOLDER" in usages
    assert not [usage for usage in usages if "-m" in usage.split()]


@pytest.fixture
def own_rule(tmp_path, monkeypatch):
    """The file of the page on methods of one's own, in the current folder, and the registry as it was afterwards."""
    code, use = re.findall(r"```python\n(.*?)```", page("how_to/write_a_method.md"), re.DOTALL)
    assert code.startswith("# my_rule.py\n") and len(code.splitlines()) <= 40
    (tmp_path / "my_rule.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(nj.methods, "RULES", dict(nj.methods.RULES))
    yield use
    sys.modules.pop("my_rule", None)


def test_a_method_in_forty_lines(own_rule, shared_models, tmp_path, nufilt):
    scope = {}
    exec(own_rule, scope)
    rng = np.random.default_rng(0)
    name = "model.layers.0.mlp.up_proj.weight"
    base, first, second = (rng.normal(size=(4, 6)).astype(np.float32) for _ in range(3))
    rule = scope["rule"]
    state = rule.update(rule.update(rule.init({name: base}), {name: first}), {name: second})
    d, t = (x.astype(np.float64) - base for x in (first, second))
    expected = base + d + t - 0.8 * (d * t).sum() / (d * d).sum() * d
    np.testing.assert_allclose(state.merged[name], expected, atol=1e-5)
    tasks = [part for task in ("alpha", "beta") for part in ("--task", f"{task}={shared_models / task}")]
    how = ("--method", "my_rule:RULE", "--method-args", "keep=0.2", "--out", "merged", "--json")
    result = nufilt("merge", "--base", shared_models / "base", *tasks, *how)
    assert result.code == 0 and result.json["config"] == {"keep": 0.2}, result.err


def test_the_pages_of_one_machine_name_no_path():
    for path in [*PAGES, *ROOT.glob("*.md")]:
        assert not re.findall(r"(?<![\w.}/])/(?:home|root|work|tmp|Users)/[\w.-]+", path.read_text(encoding="utf-8")), (
            path
        )


def test_the_version_stands_once():
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in document["project"]["dynamic"]
    run = subprocess.run(
        ["git", "grep", "-l", f'"{nj.__version__}"'], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert [name for name in run.stdout.split() if name.endswith((".py", ".toml", ".cff"))] == [
        "nufilt_jax/__init__.py"
    ]
