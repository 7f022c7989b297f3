"""--plan writes nothing and refuses what a merge refuses; stdout and stderr hold what they should, bare."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys

import model_builders as build
import numpy as np
import pytest
from rich.console import Console

from nufilt_jax.commands.text import show_wrapped
from nufilt_jax.engine import estimate, layout
from nufilt_jax.engine.memory import RUNTIME, parse_size
from nufilt_jax.methods import RULES

ANSI = "\x1b["


def times(folder):
    """Everything below a folder and itself, folders' times included."""
    return {str(p): p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}, build.snapshot(folder)


def test_plan_writes_nothing(shared_models, tmp_path, nufilt, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NUFILT_CACHE", str(tmp_path / "cache"))
    before = times(tmp_path), times(shared_models)
    for argv in (
        command(shared_models, tmp_path / "deep" / "out", "--plan"),
        ["plan", *command(shared_models, tmp_path / "out")[1:], "--json"],
        ["plan", "--model", "tiny"],
        ["plan", "--base", shared_models / "base", "--task", f"alpha={shared_models / 'alpha'}"],
    ):
        assert nufilt(*argv).code == 0
    assert (times(tmp_path), times(shared_models)) == before


def test_plan_says_what_will_be_done(shared_models, tmp_path, nufilt, command):
    result = nufilt(*command(shared_models, tmp_path / "out", "--plan", "--json"))
    assert (result.code, result.err) == (0, "")
    plan = result.json
    assert plan["out"] == str(tmp_path / "out")
    assert [(task["name"], task["done"]) for task in plan["tasks"]] == [(n, False) for n in ("alpha", "beta", "gamma")]
    assert (plan["method"], plan["config"]["filter_rank"], plan["seed"]) == ("nufilt", 4, 0)
    assert set(plan["layers_selected"]) == set(build.SELECTED)
    shapes = {tuple(stack["shape"]): stack["layers"] for stack in plan["stacks"]}
    assert shapes == {(build.WIDTH, build.WIDTH): 8, (build.HIDDEN, build.WIDTH): 2}
    text = nufilt(*command(shared_models, tmp_path / "out", "--plan")).out
    assert all(f"{name}: {shared_models / name}" in text for name in ("alpha", "beta", "gamma"))


def test_time_is_told_of_methods_whose_cost_is_known(shared_models, tmp_path, nufilt, command, monkeypatch):
    monkeypatch.setattr(estimate, "products_per_second", lambda: 1e10)
    monkeypatch.setitem(RULES, "own", dataclasses.replace(RULES["sum"], name="own", elementwise=False))
    elementwise = {name for name, rule in RULES.items() if rule.elementwise}
    assert elementwise == {"sum", "weight_average", "task_arithmetic", "magmax"}
    for method, is_known in (("nufilt", True), ("magmax", True), ("null_space", False), ("own", False)):
        argv = command(shared_models, tmp_path / "out", "--plan", "--json", "--method", method, n=2)
        seconds = nufilt(*argv).json["seconds"]
        assert (seconds["merging"] is not None) == (seconds["compiling"] is not None) == is_known


def test_a_plan_of_built_in_models_names_no_passing_folder(nufilt, tmp_path, monkeypatch):
    monkeypatch.setenv("NUFILT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    told = nufilt("plan", "--model", "tiny").out
    assert told.startswith("base    tiny/base (built in)\n") and "letters: tiny/letters (built in)\n" in told
    planned = nufilt("plan", "--model", "tiny", "--json").json
    assert {planned["base"]["source"], planned["tasks"][0]["source"]} > {"tiny/base (built in)"}
    assert "nufilt-" not in told.replace("nufilt-tiny", "")


def test_lines_are_wrapped_on_a_terminal_and_nowhere_else():
    line = "method  nufilt (" + ", ".join(f"setting_{n} {n}" for n in range(12)) + "), seed 0"
    for terminal in (True, False):
        stream = io.StringIO()
        show_wrapped(Console(file=stream, force_terminal=terminal, width=200), line)
        told = stream.getvalue().splitlines()
        assert (max(map(len, told)) <= 80, told == [line]) == (terminal, not terminal)
        assert " ".join(part.strip() for part in told) == line
        assert all(part.startswith(" " * 8) for part in told[1:])


def test_plan_of_a_merge_that_is_there(shared_models, tmp_path, nufilt, command):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, n=2)).code == 0
    before = times(tmp_path)
    plan = nufilt("add", out, "--task", f"gamma={shared_models / 'gamma'}", "--plan", "--json").json
    assert [task["done"] for task in plan["tasks"]] == [True, True, False]
    plan = nufilt(*command(shared_models, out, "--plan", "--json", n=2)).json
    assert [task["done"] for task in plan["tasks"]] == [True, True]
    refused = nufilt(*command(shared_models, out, "--plan", "--seed", "9", n=2))
    assert (refused.code, refused.err.startswith("nufilt: --seed: is 0 in the merge in")) == (1, True)
    assert times(tmp_path) == before


def test_what_is_refused_for_itself_is_not_told_again_for_being_other_than_the_merge(
    shared_models, tmp_path, nufilt, command
):
    argv = command(shared_models, tmp_path / "out", n=2)
    assert nufilt(*argv, "--method", "weight_average").code == 0
    unknown = nufilt(*argv, "--plan", "--method", "summ")
    assert (unknown.code, len(unknown.lines)) == (1, 1) and "'summ' is not known" in unknown.err


def test_a_device_with_little_memory_takes_windows(shared_models, tmp_path, nufilt, command, monkeypatch):
    monkeypatch.setattr(layout, "device_memory", lambda: 100_000)
    planned = nufilt(*command(shared_models, tmp_path / "out", "--plan", "--json"))
    assert planned.code == 0 and len(planned.json["windows"]) > 1
    monkeypatch.setattr(layout, "device_memory", lambda: 1000)
    refused = nufilt(*command(shared_models, tmp_path / "out", "--plan"))
    assert refused.code == 1 and refused.err.startswith("nufilt: device: its memory takes 0.00 GB of D at a time")


def test_plan_refuses_what_a_merge_refuses_but_values(models, tmp_path, nufilt, command):
    tensors = build.weights(models / "beta")
    tensors[build.Q0][0, 0] = np.nan
    (models / "beta" / "model.safetensors").unlink()
    build.save_file(tensors, models / "beta" / "model.safetensors")
    assert nufilt(*command(models, tmp_path / "out", "--plan")).code == 0
    assert nufilt(*command(models, tmp_path / "out")).code == 1
    build.save_file(tensors | {build.Q0: np.zeros((1, 1), np.float32)}, models / "beta" / "model.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    plan, merge = nufilt(*command(models, tmp_path / "out", "--plan")), nufilt(*command(models, tmp_path / "out"))
    assert (plan.code, len(plan.lines)) == (1, 2)
    assert plan.err == merge.err


def test_stdout_is_one_json_document(shared_models, tmp_path, finish, command):
    argv = command(shared_models, tmp_path / "out", "--json")
    result = finish("-m", "nufilt_jax.merge", *argv[1:])
    assert (result.code, result.err) == (0, "")
    document = json.loads(result.out)
    assert document["out"] == str(tmp_path / "out")
    recipe = json.loads((tmp_path / "out" / "nufilt.json").read_text())
    for key in ("method", "config", "seed", "steps"):
        assert document[key] == recipe[key]
    for told, kept in zip(document["tasks"], recipe["tasks"], strict=True):
        assert told.pop("source") == str(shared_models / told["name"])  # from anywhere; the file's is relative
        assert kept.pop("source") == os.path.relpath(shared_models / told["name"], tmp_path / "out")
        assert told == kept


def test_quiet(shared_models, tmp_path, nufilt, command):
    result = nufilt(*command(shared_models, tmp_path / "out", "--quiet"))
    assert (result.code, result.out, result.err) == (0, "", "")
    assert nufilt(*command(shared_models, tmp_path / "out", "--quiet", "--plan")).out == ""
    assert nufilt(*command(shared_models, tmp_path / "out", "--quiet", "--json")).json["method"] == "nufilt"


def test_pipes_get_no_codes_and_no_wrapping(shared_models, tmp_path, nufilt, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    for options in ((), ("--plan",)):
        result = nufilt(*command(shared_models, tmp_path / "out", *options))
        assert ANSI not in result.out + result.err
        assert "loss" in result.out or str(shared_models / "beta") in result.out
    wide = nufilt(*command(shared_models, tmp_path / "wide", "--filter-rank", "99")[:-2], "--plan")
    assert len(wide.lines) <= 1


def test_paths_are_shown_as_they_are(shared_models, tmp_path, nufilt):
    strange = tmp_path / "[red]a:cat:b"
    shutil.copytree(shared_models / "alpha", strange)
    result = nufilt("plan", "--base", shared_models / "base", "--task", f"[bold]={strange}", "--method", "sum")
    assert (result.code, result.err) == (0, "")
    assert f"[bold]: {strange}\n" in result.out


def test_rank_as_large_as_the_layer_is_warned_about(shared_models, tmp_path, nufilt):
    argv = ("--base", shared_models / "base", "--task", f"alpha={shared_models / 'alpha'}")
    result = nufilt("plan", *argv)
    assert (result.code, len(result.lines)) == (0, 1)
    assert result.err.startswith("nufilt: warning: --filter-rank: 128") and "vision_model" in result.err


def test_option_without_effect_is_warned_about(shared_models, tmp_path, nufilt):
    argv = ("--base", shared_models / "base", "--task", f"alpha={shared_models / 'alpha'}", "--method", "sum")
    result = nufilt("plan", *argv, "--filter-rank", "3", "--steps", "2")
    assert result.lines == ["nufilt: warning: --filter-rank, --steps: no effect: sum has no such setting"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("no_color", [False, True])
def test_terminal(shared_models, tmp_path, command, no_color):
    """On a terminal there is a progress bar and colour; NO_COLOR takes the colour away."""
    import pty

    code = "from nufilt_jax.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    argv = command(shared_models, tmp_path / "out", "--method", "sum")
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {
        "TERM": "xterm-256color",
        "COLUMNS": "200",
    }
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        stdout=follower,
        stderr=follower,
        env=environment | ({"NO_COLOR": "1"} if no_color else {}),
        cwd=os.getcwd(),
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            shown += (piece := os.read(leader, 4096))
        except OSError:  # the end of a pseudo-terminal on Linux
            break
        if not piece:
            break
    os.close(leader)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert "gamma" in text
    bare = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert bare.count("merged  vision_model") == 2 and bare.count("left    ") > 0  # two patterns, once
    lines = [line.rpartition("\r")[2] for line in bare.replace("\r\n", "\n").split("\n")]
    told = [line for line in lines if re.match("(merged|left|grid|memory) ", line)]
    assert len(told) > 4 and max(map(len, told)) <= 80
    assert "100%" in bare and "loading" in bare
    colours = re.findall(r"\x1b\[[0-9;]*m", text)
    assert any(re.search(r"[\[;]3[0-8]", code) for code in colours) != no_color, colours


@pytest.mark.parametrize("has_backend", [True, False])
def test_the_machine_is_measured_with_and_without_a_backend(monkeypatch, has_backend):
    def failing(_):
        raise RuntimeError("no backend")

    if not has_backend:
        monkeypatch.setattr(estimate.jax, "device_put", failing)
    assert 1e8 < estimate.products_per_second(0.05) < 1e15


def write_table(folder, rows, columns):
    """A model whose only tensor is a large table of zeros, which take no disk."""
    folder.mkdir()
    n_bytes = 4 * rows * columns
    entry = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, n_bytes]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + n_bytes)
    (folder / "config.json").write_text("{}")
    return n_bytes


@pytest.mark.parametrize(
    ("method", "times"), [("task_arithmetic", 5), ("weight_average", 5), ("magmax", 6), ("ties", 7)]
)
def test_methods_that_work_number_by_number_take_no_memory_for_solves(tmp_path, nufilt, method, times):
    """D, what is kept beside it and the table of both models in float32; or what is written of these at a time."""
    n_bytes = write_table(tmp_path / "base", 60000, 1024)
    write_table(tmp_path / "task", 60000, 1024)
    where = ("--base", tmp_path / "base", "--task", f"one={tmp_path / 'task'}", "--out", tmp_path / "out", "--plan")
    result = nufilt("merge", *where, "--method", method, "--max-memory", "1GB")
    least = parse_size(re.search(r"at least --max-memory (\w+)\)", result.err)[1])
    assert least == pytest.approx(RUNTIME + times * n_bytes, abs=2e6)
    assert nufilt("merge", *where, "--method", method, "--max-memory", f"{least}B").code == 0
    if method == "ties":  # others decompose what they take, and may need as much again and more
        assert nufilt("merge", *where, "--method", "iso_c", "--max-memory", f"{least}B").code == 1
