"""What a machine can check of the README and the pages of the documentation."""

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "benchmarks" / "study"
PAGES = [ROOT / "README.md", *(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_opens_with_the_two_commands():
    first = re.search(r"```\n(.*?)```", README, re.DOTALL)
    assert [line.split("#")[0].strip() for line in first[1].splitlines()] == ["make demo", "make test"]


def test_its_python_runs():
    [snippet] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    test = doctest.DocTestParser().get_doctest(snippet, {}, "README.md", "README.md", 0)
    assert doctest.DocTestRunner().run(test).failed == 0


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_its_merges_run_one_after_another(nufilt, shared_models, tmp_path, monkeypatch):
    """All that it shows of one's own models, but for what needs images or the Hub; `merge.toml` is filled in."""
    monkeypatch.chdir(tmp_path)
    for name, model in {"BASE": "base", "MODEL_1": "alpha", "MODEL_2": "beta", "MODEL_3": "gamma"}.items():
        (tmp_path / name).symlink_to(shared_models / model)
    section = README.partition("## Merge your own models")[2].partition("\n## ")[0]
    lines = re.findall(r"^nufilt .*$", "".join(re.findall(r"```\n(.*?)```", section, re.DOTALL)), re.MULTILINE)
    commands = [command.split() for line in lines for command in line.partition("#")[0].split(";")]
    assert [argv[1] for argv in commands].count("merge") == 4
    for _, command, *argv in commands:
        if command in ("evaluate", "analyze", "push") or "--model" in argv:
            continue
        result = nufilt(command, *argv)
        assert result.code == 0, (command, *argv, result.err)
        if command == "init":
            text = Path("merge.toml").read_text(encoding="utf-8")
            text = re.sub(r'"openai/[^"]+"', '"BASE"', text)
            Path("merge.toml").write_text(re.sub(r'"tanganke/[^"]+"', '"MODEL_1"', text), encoding="utf-8")
    assert {path.parent.name for path in tmp_path.glob("*/nufilt.json")} == {"merged", "mine", "again"}


def test_what_it_installs_is_what_the_demo_needs():
    extras = re.search(r"\.demo:.*\n.*'\.\[(.*)\]'", (ROOT / "Makefile").read_text(encoding="utf-8"))[1]
    told = extras.replace("$(comma)", ",")
    for page in ("README.md", "docs/get_started.md"):
        assert f"pip install '.[{told}]'" in (ROOT / page).read_text(encoding="utf-8")


QUOTING = ["README.md", "docs/get_started.md", "docs/benchmarks.md", "benchmarks/study/STUDY.md"]


def test_only_these_pages_quote_results():
    pages = [*PAGES, STUDY / "STUDY.md"]
    assert {str(p.relative_to(ROOT)) for p in pages if "<!-- results:" in p.read_text(encoding="utf-8")} == set(QUOTING)


@pytest.mark.parametrize("page", QUOTING)
def test_its_numbers_are_those_of_the_results_files(page):
    from benchmarks.common import records
    from benchmarks.study import tiny

    written = (ROOT / page).read_text(encoding="utf-8")
    quoted = re.findall(r"<!-- results: (\S+) ?([^\n]*?) ?-->\n(.*?)\n<!-- end of results -->", written, re.DOTALL)
    assert len(quoted) == written.count("<!-- results:") > 0
    for path, title, text in quoted:
        results = json.loads((ROOT / path).read_text())
        assert text == (tiny.markdown(results) if ROOT / path == tiny.RESULTS else records.markdown(results, title))


def test_the_pictures_of_the_study_are_there():
    pictures = re.findall(r"!\[[^]]+\]\((\S+)\)", (STUDY / "STUDY.md").read_text(encoding="utf-8"))
    assert pictures
    assert all((STUDY / picture).is_file() for picture in pictures)


def test_options_on_all_pages_exist(nufilt):
    commands = (
        *((name,) for name in ["merge", "add", "evaluate", "analyze", "verify", "export", "extract", "push"]),
        (),
    )
    told = "".join(nufilt(*command, "--help").out for command in commands)
    scripts = [
        subprocess.run(
            [sys.executable, "-m", name, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout
        for name in ("benchmarks.study.tables", "benchmarks.study.figures", "benchmarks.speed.accelerator")
    ]
    known = set(re.findall(r"--[a-z][a-z-]+", told + "".join(scripts)))
    known |= {"--from", "--spec", "--json"}  # of uvx and pipx
    known |= {"--ntasks", "--worker", "--command", "--xla"}  # of srun, gcloud and XLA
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - known - {"--fail-on-warning"} == set(), page


def test_its_table_of_methods_is_that_of_the_rules():
    from nufilt_jax.methods import RULES

    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    [table] = re.findall(r"<!-- methods -->\n(.*?)\n<!-- end of methods -->", page, re.DOTALL)
    head, _, *rows = table.split("\n")
    assert head == "| `--method` | θᵐ after the step | touches | needs | cost of a layer | source |"
    assert rows == [
        f"| `{rule.name}` | {rule.update} | {rule.touches} | {rule.needs} | {rule.cost} | {rule.source} |"
        for rule in RULES.values()
    ]
