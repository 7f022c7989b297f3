"""What is shown: help, tables, the table of methods, progress in words, and what `push` would upload."""

import dataclasses
import io
import json
import re
import shlex

import pytest
from rich.console import Console

from nufilt_jax import NufiltConfig
from nufilt_jax.commands import app
from nufilt_jax.commands.arguments import Arguments
from nufilt_jax.commands.console import show_table
from nufilt_jax.commands.init import shown_default
from nufilt_jax.commands.method_help import stated_rules
from nufilt_jax.methods import RULES

COMMANDS = [(), *([name] for name in ("merge", "add", "plan", "init", "evaluate", "analyze", "push"))]


@pytest.mark.parametrize("argv", COMMANDS, ids=str)
def test_help_fits_a_terminal(argv, nufilt, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    told = nufilt(*argv, "--help").out
    assert max(map(len, told.splitlines())) <= 80
    words = set(re.findall(r"[\w/.]+", told))
    assert "…" not in told and "\x1b" not in told
    assert {"nufilt"} <= words


def test_help_lists_what_a_command_takes(nufilt):
    options = {
        name: set(re.findall(r"--[a-z][a-z-]+", nufilt(name, "--help").out)) for name in ("merge", "add", "plan")
    }
    of_a_run = {"--plan", "--distributed", "--coordinator", "--processes", "--process"}
    assert options["plan"] == options["merge"] - of_a_run
    assert {"--task", "--evaluate", "--max-memory"} <= options["add"]
    assert "As MODULE:RULE, if a rule of your own made the merge" in nufilt("add", "--help").out
    kept = ("--base", "--filter-rank", "--dtype", "--out", "--config", "--output", "--adapter-out-rank")
    assert options["add"].isdisjoint(kept)


def test_help_marks_what_extract_cannot_do_without(nufilt):
    told = " ".join(nufilt("extract", "--help").out.replace("│", " ").split())
    parts = dict(part.split(" ", 1) for part in told.split(" --")[1:])
    assert {name for name, text in parts.items() if "[required]" in text} == {"base", "rank", "out"}


def test_defaults_shown_are_those_taken():
    hints = {field.name: field.type for field in dataclasses.fields(Arguments)}
    for name, value in dataclasses.asdict(NufiltConfig()).items():
        if name in hints:
            told = shown_default(hints[name])
            assert told == str(value) or float(told) == value
    assert shown_default(hints["method"]) == "nufilt" and shown_default(hints["seed"]) == "0"


def test_the_examples_of_the_help_run(nufilt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line.split("#")[0] for line in app.EXAMPLES.splitlines() if line.startswith("  nufilt ")]
    assert len(lines) == 3
    for line in lines:
        _, command, *argv = shlex.split(line)
        result = nufilt("plan" if command == "merge" else command, *argv)  # other tests merge and measure these
        assert result.code == 0, result.err


def test_the_table_of_methods_is_one_screen(nufilt):
    told = nufilt("merge", "--method", "help").out.splitlines()
    assert len(told) <= 24 and max(map(len, told)) <= 80
    assert [line.split()[0] for line in told if line.split() and line.split()[0] in RULES] == list(RULES)
    for stated, rule in zip(stated_rules(), RULES.values(), strict=True):
        assert {key: getattr(rule, key) for key in stated} == stated


def test_one_method(nufilt):
    told = nufilt("merge", "--method", "help=ties")
    assert (told.code, told.err) == (0, "")
    words = " ".join(told.out.split())
    assert "density=0.2" in words and " ".join(RULES["ties"].update.split()) in words and "magmax" not in words
    assert nufilt("merge", "--method", "help=tie").code == 1


@pytest.mark.parametrize("method", RULES)
def test_one_method_fits_a_terminal(method, nufilt):
    assert max(map(len, nufilt("merge", "--method", f"help={method}").out.splitlines())) <= 80


def test_a_method_of_ones_own_is_told_of(nufilt, tmp_path, monkeypatch):
    code = "import dataclasses, nufilt_jax.methods as m\nRULE = dataclasses.replace(m.RULES['sum'], update='θ + 2 τ')"
    (tmp_path / "doubled.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nufilt_jax.methods.RULES", dict(RULES))
    told = nufilt("merge", "--method", "help=doubled:RULE")
    assert told.code == 0 and told.out.startswith("doubled:RULE\n  update   θ + 2 τ\n"), told.err
    assert "doubled:NONE cannot be imported" in nufilt("merge", "--method", "help=doubled:NONE").err


def test_a_table_has_no_empty_column_and_no_more_than_80():
    stream = io.StringIO()
    columns = {"task": ["a long name of a task", "b"], "empty": ["", ""]} | {
        f"model_number_{i}": ["1.0", ""] for i in range(12)
    }
    show_table(Console(file=stream, width=1000), columns, title="t", texts=("task",), section=1)
    told = stream.getvalue()
    assert max(map(len, told.splitlines())) <= 80
    assert "empty" not in told and told.count("a long name of a task") == 2 and told.count("1.0") == 12


def test_verbose_and_done(shared_models, tmp_path, nufilt, command):
    argv = command(shared_models, tmp_path / "out", n=2)
    first = nufilt(*argv, "-v")
    assert re.search(r"nufilt: +\d+\.\d\d s  beta \(2 of 2\): \d+ layers of width 16, loss", first.err)
    assert "all is done" not in first.out
    memory = json.loads((tmp_path / "out" / "nufilt.json").read_text())["memory"]
    peak, planned = (f"{memory[what] / 1e9:.2f}" for what in ("peak", "planned"))
    assert f"\nmemory  {peak} GB at most, {planned} GB planned\n" in first.out
    for head in ("seconds", "compiling", "solving"):
        assert head in first.out
    again = nufilt(*argv)
    assert f"all is done: merged model: {tmp_path / 'out'}" in again.out and "resumed" not in again.out
    assert "memory" not in again.out
    timings = json.loads((tmp_path / "out" / "nufilt.json").read_text())["steps"][1]["timings"]
    assert 0 <= timings["compile"] <= timings["solve"]


def test_verbose_goes_with_json_and_not_with_quiet(shared_models, tmp_path, nufilt, command):
    argv = command(shared_models, tmp_path / "out", "--method", "sum", "--json", n=1)
    told = nufilt(*argv, "--verbose")
    assert told.json["steps"] and re.search(r"nufilt: +\d+\.\d\d s  alpha \(1 of 1\)", told.err)
    assert nufilt(*argv, "--verbose", "--quiet").err == ""


def test_push_says_what_it_would_upload(shared_models, tmp_path, nufilt, command, refused):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, "--method", "sum", n=2)).code == 0
    (out / ".git").mkdir()
    (out / ".git" / "config").touch()  # which the Hub's library never uploads
    told = nufilt("push", out, "me/merged", "--dry-run", "--json").json
    assert not [name for name in told["files"] if ".git" in name]
    assert told["url"] is None and told["repo"] == "me/merged" and told["message"] == "sum: alpha, beta"
    assert {"model.safetensors", "config.json", "nufilt.json", "README.md"} <= told["files"].keys()
    assert not any(name.startswith("state/") for name in told["files"])
    whole = nufilt("push", out, "me/merged", "--dry-run", "--json", "--with-state").json
    assert any(name.startswith("state/") for name in whole["files"]) and whole["bytes"] > told["bytes"]
    shown = nufilt("push", out, "me/merged", "--dry-run").out
    assert "would be uploaded to me/merged" in shown and " 0.00 MB" not in shown
    assert f"{(out / 'README.md').stat().st_size / 1e3:.2f} kB  README.md\n" in shown
    (line,) = refused("push", out, "../x", "--dry-run", code=2)
    assert "is no name of a Hub repository" in line
    (line,) = refused("push", shared_models / "base", "me/x", "--dry-run")
    assert "holds no finished merge" in line


def test_push_uploads_by_the_hubs_library(shared_models, tmp_path, nufilt, command, monkeypatch):
    import huggingface_hub

    asked = {}

    class Api:
        def create_repo(self, repo, **how):
            asked["made"] = repo, how
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo}")

        def upload_folder(self, **how):
            asked["sent"] = how
            return type("Commit", (), {"commit_url": "https://huggingface.co/me/merged/commit/1"})()

    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, "--method", "sum", n=2)).code == 0
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    result = nufilt("push", out, "me/merged", "--private", "--message", "first")
    assert result.code == 0 and "uploaded: https://huggingface.co/me/merged/commit/1" in result.out
    assert asked["made"] == ("me/merged", {"private": True, "exist_ok": True})
    assert asked["sent"]["folder_path"] == out and asked["sent"]["commit_message"] == "first"
    assert "model.safetensors" in asked["sent"]["allow_patterns"]


def test_push_that_the_hub_does_not_answer(shared_models, tmp_path, nufilt, command, monkeypatch):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, "--method", "sum", n=2)).code == 0
    result = nufilt("push", out, "me/merged")  # the tests' Hub is nobody
    assert (result.code, len(result.lines)) == (1, 1)
    assert result.err.startswith("nufilt: me/merged: cannot be uploaded to: ")
