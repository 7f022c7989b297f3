"""Paths, names, terminals and environments as they come: none of them costs a merge."""

import json
import os
import subprocess
import sys

import model_builders as build
import pytest

from nufilt_jax.cli import main
from nufilt_jax.commands import process

LATIN = os.fsdecode(b"mod\xe8le")
NAMES = (LATIN, "模型 é ~x", "[v2] [red]", "a=b@c", 'it\'s  "x"', "n" * 240, "[bold]\x1b[2J")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_of_a_folder(models, tmp_path, name, nufilt, command):
    for folder in ("base", "alpha"):
        (models / folder).rename(models / f"{name[:239]}{folder[0]}")
    base, task = (models / f"{name[:239]}{letter}" for letter in "ba")
    out = tmp_path / name
    argv = ["merge", "--base", base, "--task", f"a={task}", "--out", out, "--method", "sum"]
    assert nufilt(*argv, "--json").json["out"] == str(out)
    assert json.loads((out / "nufilt.json").read_text())["base"]["source"] == f"../models/{base.name}"
    result = nufilt("add", out, "--task", f"b={models / 'beta'}")
    shown = os.fsencode(name).decode(errors="replace")  # as the fixture reads it
    assert result.code == 0 and f"merged model: {tmp_path}/{shown}" in result.out
    result = nufilt(*argv, "--task", f"b={models / 'gamma'}")
    assert (result.code, len(result.lines)) == (1, 1)


def test_a_name_that_the_disk_refuses_is_one_line(shared_models, tmp_path, refused, command):
    assert len(refused(*command(shared_models, tmp_path / ("m" * 250)))) == 1


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_encoding_of_the_terminal(shared_models, tmp_path, finish, command, encoding):
    argv = command(shared_models, tmp_path / "模型", "--method", "sum", "--task", f"模型={shared_models / 'delta'}")
    done = subprocess.run(
        [sys.executable, "-m", "nufilt_jax.cli", *map(str, argv)],
        env=os.environ | {"PYTHONIOENCODING": f"{encoding}:strict", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert ("模型" if encoding == "utf-8" else "\\u6a21\\u578b").encode() in done.stdout


@pytest.mark.parametrize("task", ["cars[v2]", "cars[bold]", "[/old]", ":cat:"])
def test_names_are_no_markup(shared_models, tmp_path, nufilt, task):
    given = ("--task", f"{task}={shared_models / 'alpha'}")
    result = nufilt("merge", "--base", shared_models / "base", *given, "--out", tmp_path / "out", "--method", "sum")
    assert result.code == 0 and task in result.out


@pytest.mark.parametrize(("task", "encoding"), [("[/x]", "ascii"), ("cars[bold]", "utf-8")])
def test_names_are_no_markup_on_a_terminal(shared_models, tmp_path, task, encoding):
    import pty

    near, far = pty.openpty()
    argv = ["merge", "--base", shared_models / "base", "--task", f"{task}={shared_models / 'alpha'}"]
    argv += ["--task", f"b={shared_models / 'beta'}", "--out", tmp_path / "out", *build.RANKS]
    child = subprocess.Popen(
        [sys.executable, "-m", "nufilt_jax.cli", *map(str, argv)],
        env=os.environ | {"PYTHONIOENCODING": f"{encoding}:strict", "PYTHONPATH": os.getcwd(), "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=far,
    )
    os.close(far)
    shown = b""
    try:
        while piece := os.read(near, 1 << 16):
            shown += piece
    except OSError:  # the other end is closed
        pass
    out, _ = child.communicate(timeout=120)
    os.close(near)
    assert child.returncode == 0, shown
    assert f"{task} (1 of 2)".encode() in shown and task.encode() in out


@pytest.mark.parametrize(
    "redirection", [">/dev/full", ">&-", "2>&-", "2>/dev/full", "| head -c 1", "2>&1 >/dev/null | true"]
)
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_what_cannot_be_shown_costs_nothing(shared_models, tmp_path, command, redirection, options):
    argv = command(
        shared_models, tmp_path / "out", "--method", "sum", "--layers", "q_proj", "--filter-rank", "3", *options
    )
    line = " ".join(f"'{part}'" for part in [sys.executable, "-m", "nufilt_jax.cli", *argv])
    done = subprocess.run(
        ["bash", "-c", f"{line} {redirection}; exit ${{PIPESTATUS[0]}}"],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "PYTHONUNBUFFERED": "1" if options else ""},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
    )
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "out.partial").exists()
    said = [line for line in done.stderr.splitlines() if not line.startswith("nufilt: warning: ")]
    if redirection == ">/dev/full":  # the user did not get what was asked for
        lost = "nufilt: stdout: cannot be written: No space left on device (the work itself is done)"
        assert (done.returncode, said) == (1, [lost])
    else:
        assert (done.returncode, said) == (0, [])


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("JAX_ENABLE_X64", "maybe"),
        ("JAX_DEFAULT_MATMUL_PRECISION", "foo"),
        ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "soon"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--plan",)], ids=["merge", "plan"])
def test_a_setting_that_jax_refuses_is_named(shared_models, tmp_path, finish, command, variable, value, options):
    argv = command(shared_models, tmp_path / "out", "--method", "sum", *options)
    result = finish("-m", "nufilt_jax.cli", *argv, env={variable: value})
    said = f"nufilt: {variable}: JAX refuses the value '{value}' (correct or unset it)\n"
    assert (result.code, result.out, result.err) == (1, "", said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("JAX_NUMPY_DTYPE_PROMOTION", "strict"),
        ("JAX_NUMPY_RANK_PROMOTION", "raise"),
        ("JAX_TRANSFER_GUARD", "disallow"),
        ("JAX_TRANSFER_GUARD_HOST_TO_DEVICE", "disallow"),
    ],
)
def test_checks_of_other_programs_are_not_those_of_this_one(
    shared_models, tmp_path, nufilt, finish, command, variable, value
):
    assert nufilt(*command(shared_models, tmp_path / "plain", n=2)).code == 0
    argv = command(shared_models, tmp_path / "checked", n=2)
    result = finish("-m", "nufilt_jax.cli", *argv, env={variable: value})
    assert (result.code, result.err) == (0, "")
    assert build.weight_bytes(tmp_path / "plain") == build.weight_bytes(tmp_path / "checked")


def test_a_refusal_without_stderr(shared_models, tmp_path, monkeypatch, command):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(command(shared_models, tmp_path / "out", "--seed", "-1")) == 1


def test_tilde_is_the_home_folder(models, tmp_path, monkeypatch, nufilt):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(models)
    argv = ["merge", "--base=~/models/base", "--task=a=~/models/alpha", "--out=~/merged", "--method", "sum"]
    assert nufilt(*argv).code == 0
    assert nufilt("merge", "--add=~/merged", f"--task=b={models / 'beta'}").code == 0
    assert len(nufilt("add", "~/merged", "--task", "c=gamma", "--json").json["tasks"]) == 3
    assert (tmp_path / "merged" / "model.safetensors").is_file() and not (models / "~").exists()
    for given in ("--data=~/none", "--tasks-file=~/none.json"):
        options = ("--evaluate",) if "tasks" in given else ("--method", "wemoe")
        result = nufilt(*argv[:3], "--out=~/other", given, *options)
        assert result.code == 1 and str(tmp_path / "none") in result.err
    for name in ("evaluate", "analyze"):
        assert nufilt(name, "~/nothing").err.startswith(f"nufilt: {tmp_path / 'nothing'}: ")


def test_a_home_that_there_is_not(refused):
    (line,) = refused("merge", "--out=~nobody-here/x", code=2)
    assert line.startswith("nufilt: --out: ~nobody-here/x: there is no such home folder")


@pytest.mark.parametrize(
    ("platforms", "extra"),
    [("cuda", "nufilt_jax[cuda]"), ("gpu", "nufilt_jax[cuda]"), ("nonsense", "unset it)"), ("tpu", "nufilt_jax[tpu]")],
)
def test_a_backend_that_there_is_not(shared_models, tmp_path, finish, command, platforms, extra):
    out, environment = tmp_path / "deep" / "out", {"env": {"JAX_PLATFORMS": platforms}}
    result = finish("-m", "nufilt_jax.cli", *command(shared_models, out), **environment)
    if platforms != "nonsense" and result.code == 0:
        pytest.fail("a test of machines without accelerators")
    assert (result.code, result.out, len(result.lines)) == (1, "", 1)
    assert result.err.startswith(f"nufilt: JAX_PLATFORMS: {platforms!r} is not available here") and extra in result.err
    assert not out.parent.exists()
    assert finish("-m", "nufilt_jax.cli", *command(shared_models, out, "--plan"), **environment).code == 0
    counted = finish("-m", "nufilt_jax.cli", *command(shared_models, out, "--plan", "--devices=all"), **environment)
    assert (counted.code, counted.err) == (1, result.err)


@pytest.mark.parametrize(
    ("name", "value"),
    [("NUFILT_CACHE", "/dev/null"), ("JAX_COMPILATION_CACHE_DIR", "/proc/none"), ("HOME", "/dev/null/x")],
)
def test_no_place_for_a_compile_cache(shared_models, tmp_path, finish, command, name, value):
    unset = dict.fromkeys(("XDG_CACHE_HOME", "NUFILT_CACHE", "JAX_COMPILATION_CACHE_DIR"), "")
    result = finish(
        "-m", "nufilt_jax.cli", *command(shared_models, tmp_path / "out", "--quiet"), env=unset | {name: value}
    )
    assert (result.code, result.err) == (0, "")


def test_a_cache_is_not_looked_for_in_a_folder_named_tilde(monkeypatch):
    for name in ("NUFILT_CACHE", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # this user has no home folder
    process.prepare_process()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("option", ["--filter-rank", "--steps", "--seed", "--limit", "--learning-rate"])
@pytest.mark.parametrize("value", ["x", "1.5x", "9" * 5000 + "x", ""])
def test_what_is_no_number(refused, option, value):
    expected = "a number" if option == "--learning-rate" else "a whole number"
    (line,) = refused("merge", f"{option}={value}", code=2)
    assert line.startswith(f"nufilt: {option}: must be {expected}, got '{value[:60]}") and len(line) < 200


@pytest.mark.parametrize("value", ["9" * 5000, str(10**30)])
def test_numbers_too_large(refused, shared_models, tmp_path, command, value):
    lines = refused(*command(shared_models, tmp_path / "out", "--seed", value), code=2 if len(value) > 4300 else 1)
    assert len(lines) == 1 and lines[0].startswith("nufilt: --seed: must be ") and len(lines[0]) < 200


@pytest.mark.parametrize(("name", "nearest"), [("tinny", "tiny"), ("vit-b33", "vit-b32"), ("opt-13b", None)])
def test_a_model_that_there_is_not(refused, name, nearest):
    (line,) = refused("merge", "--model", name)
    assert (f"did you mean {nearest}?" in line) == (nearest is not None)
