"""What solves a task is compiled before it is needed, and once; nobody waits for it who does not need it."""

import dataclasses
import json
import threading

import adapter_builders as adapters
import jax
import model_builders as build
import pytest
from jax import monitoring

from nufilt_jax import methods
from nufilt_jax.engine import cell
from nufilt_jax.engine.uninterrupted import COMPILING

SOLVES = ("jit(_added_step)",)


@pytest.fixture
def compiled(monkeypatch):
    """The names of threads in which solves are compiled; each merge has compiled ahead before it begins to work."""
    found, begin = [], cell.CompileAhead

    def on(event, seconds, **facts):
        if event.endswith("backend_compile_duration") and facts.get("fun_name") in SOLVES:
            found.append(threading.current_thread().name)

    def at_once(prepare):
        ahead = begin(prepare)
        ahead.wait(lambda program: None)
        return ahead

    monkeypatch.setattr(cell, "CompileAhead", at_once)
    jax.clear_caches()
    monitoring.register_event_duration_secs_listener(on)
    yield found
    monitoring.unregister_event_duration_listener(on)


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """A base, three adapters of it, and a whole model."""
    folder = tmp_path_factory.mktemp("streams")
    base = build.tower(0)
    build.write(folder / "base", base)
    for seed, name in enumerate(("one", "two", "three"), 1):
        adapters.write(folder / name, adapters.factors(base, seed, 2), base_model_name_or_path=str(folder / "base"))
    build.write(folder / "full", build.fine_tuned(base, 9))
    return folder


@pytest.mark.parametrize(
    "options",
    [(), ("--method", "null_space", "--filter-rank", "3")],
    ids=["nufilt", "null_space"],
)
def test_what_a_merge_solves_is_compiled_ahead(nufilt, shared_models, tmp_path, command, compiled, options):
    ranks = build.RANKS if "null_space" not in options else ()
    argv = ("--base", shared_models / "base", "--out", tmp_path / "out", *ranks, *options)
    tasks = [part for name in build.TASKS[:3] for part in ("--task", f"{name}={shared_models / name}")]
    result = nufilt("merge", *argv, *tasks, "--json")
    assert result.code == 0, result.err
    assert compiled and set(compiled) == {COMPILING}
    assert result.json["compiled"]["programs"] >= len(compiled)


@pytest.mark.parametrize("tasks", [("one", "two", "three"), ("full", "one")], ids="-".join)
def test_streams_of_adapters_too(nufilt, streams, tmp_path, compiled, tasks):
    given = [part for name in tasks for part in ("--task", f"{name}={streams / name}")]
    result = nufilt("merge", "--base", streams / "base", *given, "--out", tmp_path / "out", *build.RANKS)
    assert result.code == 0, result.err
    assert compiled and set(compiled) == {COMPILING}


def test_a_merge_that_is_gone_on_with(nufilt, shared_models, tmp_path, command, compiled):
    assert nufilt(*command(shared_models, tmp_path / "out", n=1)).code == 0
    assert not compiled  # the first task is taken as it is
    added = nufilt("add", tmp_path / "out", "--task", f"{build.TASKS[1]}={shared_models / build.TASKS[1]}")
    assert added.code == 0, added.err
    assert compiled and set(compiled) == {COMPILING}


def test_what_cannot_be_compiled_ahead_is_compiled_where_it_is_needed(
    nufilt, shared_models, tmp_path, command, monkeypatch
):
    def fail(*_):
        raise RuntimeError("no compiler")

    rule = methods.find("nufilt")
    monkeypatch.setitem(methods.RULES, "nufilt", dataclasses.replace(rule, prepare=fail))
    assert nufilt(*command(shared_models, tmp_path / "out")).code == 0


def test_what_is_waited_for_is_told():
    go_on, told = threading.Event(), []

    def tell(program):
        told.append(program)
        go_on.set()

    ahead = cell.CompileAhead(lambda: go_on.wait(60))
    ahead.wait(tell)
    ahead.wait(tell)
    assert told == ["the solve"]


def test_a_run_that_fails_does_not_stay_for_the_compiler(models, tmp_path, finish, command):
    """The compiler would take a quarter of an hour, and the command ends as soon as a task cannot be read."""
    (tmp_path / "slow.py").write_text(SLOW)
    argv = command(models, tmp_path / "out", "--quiet")
    result = finish(tmp_path / "slow.py", json.dumps(str(models / build.TASKS[1])), *argv)
    assert (result.code, len(result.lines)) == (1, 1), result.err
    assert f"nufilt: {models / build.TASKS[1]}" in result.err


SLOW = """
import json, shutil, sys, threading
from nufilt_jax.engine import ahead
from nufilt_jax.engine.walk import Walk
from nufilt_jax.cli import main

gone = json.loads(sys.argv.pop(1))
ahead.CompileAhead._run = lambda self: threading.Event().wait(900)
load = Walk._load

def after_removal(self, cell, stop):
    shutil.rmtree(gone, ignore_errors=True)
    return load(self, cell, stop)

Walk._load = after_removal
sys.exit(main())
"""
