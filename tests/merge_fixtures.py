"""Models for the command line to merge, and ways to run it: fixtures of the tests of commands and engine."""

import os
import subprocess
import sys
from pathlib import Path

import model_builders as build
import pytest
from command_result import Result

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def refused(nufilt, tmp_path):
    """Runs a command that must be refused, and returns its lines; checks that it wrote nothing."""

    def run(*argv, code=1):
        before = build.snapshot(tmp_path)
        result = nufilt(*argv)
        assert (result.code, result.out) == (code, ""), result.err
        assert build.snapshot(tmp_path) == before
        assert result.lines and all(line.startswith("nufilt: ") for line in result.lines)
        assert "Traceback" not in result.err
        return [line for line in result.lines if not line.startswith("nufilt: warning: ")]

    return run


@pytest.fixture(scope="session")
def shared_models(tmp_path_factory):
    """A base and four fine-tuned models, for tests that only read them."""
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def models(tmp_path):
    """A base and four fine-tuned models of the test's own."""
    return make_models(tmp_path / "models")


def make_models(folder):
    base = build.tower(0)
    build.write(folder / "base", base)
    for seed, name in enumerate(build.TASKS, 1):
        build.write(folder / name, build.fine_tuned(base, seed))
    return folder


@pytest.fixture(scope="session")
def command():
    """The arguments of a merge of the first `n` models of a folder."""

    def arguments(models, out, *options, n=3, tasks=None):
        names = build.TASKS[:n] if tasks is None else tasks
        given = [part for name in names for part in ("--task", f"{name}={models / name}")]
        has_ranks = not {"sum", "weight_average", "task_arithmetic"} & set(options)
        ranks = build.RANKS if has_ranks else ()
        return ["merge", "--base", str(models / "base"), *given, "--out", str(out), *ranks, *options]

    return arguments


@pytest.fixture
def stop_before(monkeypatch):
    """Ends a run, as Ctrl-C does, before it merges the task of this name; returns what lets it go on."""

    def arm(task):
        from nufilt_jax.engine.walk import Walk  # not before conftest has set up the checks of types

        merge = Walk._merge

        def interrupted(walk, cell, *rest):
            if walk._names[cell.task] == task:
                raise KeyboardInterrupt
            return merge(walk, cell, *rest)

        monkeypatch.setattr(Walk, "_merge", interrupted)
        return lambda: monkeypatch.setattr(Walk, "_merge", merge)

    return arm


@pytest.fixture
def in_windows(monkeypatch):
    """Cuts merges into windows of at most so many bytes; the models are far too small for a cap to do that."""
    from nufilt_jax.engine import grid, layout  # not before conftest has set up the checks of types

    plan_windows = layout.plan_windows

    def cut(most):
        def planned(stacks, sizes, reach, cap, done, first, **agreed):
            rows, memory = plan_windows(stacks, sizes, reach, cap, done, first, **agreed)
            return (rows if reach.whole_model else grid.restarted(stacks, done, most, first)), memory

        monkeypatch.setattr(layout, "plan_windows", planned)

    return cut


@pytest.fixture
def spawn():
    """Starts Python in another process, which ends with the test."""
    started = []

    def start(*argv, **options):
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"} | options.pop("env", {})
        process = subprocess.Popen(
            [sys.executable, *map(str, argv)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def finish(spawn):
    """Runs Python in another process to its end."""

    def run(*argv, **options):
        process = spawn(*argv, **options)
        out, err = process.communicate(timeout=120)
        return Result(code=process.returncode, out=out, err=err)

    return run
