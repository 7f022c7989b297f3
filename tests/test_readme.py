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
