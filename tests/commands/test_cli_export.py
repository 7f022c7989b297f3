"""Parts of a finished merge in files that other programs read."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import model_builders as build
import numpy as np
import pytest
from safetensors.numpy import load_file

from nufilt_jax import NufiltConfig, solve_stack
from nufilt_jax.commands.export import PARTS
from nufilt_jax.engine import sameness


@pytest.fixture(scope="module")
def merged(shared_models, tmp_path_factory, command):
    """A merge of three models by nufilt, which tests only read."""
    from nufilt_jax.cli import main

    out = tmp_path_factory.mktemp("merge") / "out"
    assert main([*command(shared_models, out), "--quiet"]) == 0
    return out


def difference(after, before):
    return {name: after[name] - before[name] for name in build.SELECTED}


@pytest.mark.parametrize("step", [None, 1, 3])
def test_task_vectors(merged, shared_models, tmp_path, nufilt, step):
    out = tmp_path / "tau.safetensors"
    given = () if step is None else ("--step", step)
    result = nufilt("export", merged, "--what", "tau", "--out", out, *given)
    assert (result.code, result.out) == (0, f"tau: {len(build.SELECTED)} tensors in {out}\n")
    task = build.TASKS[(step or 3) - 1]
    wanted = difference(build.weights(shared_models / task), build.weights(shared_models / "base"))
    found = load_file(out)
    assert found.keys() == wanted.keys()
    assert all(build.same_bits(found[name], wanted[name]) for name in wanted)


def test_the_merged_update(merged, shared_models, tmp_path, nufilt):
    out = tmp_path / "deep" / "delta.safetensors"
    out.parent.mkdir()
    told = nufilt("export", merged, "--what", "delta", "--out", out, "--json").json
    assert told == {"folder": str(merged), "what": "delta", "out": str(out), "step": None, "count": len(build.SELECTED)}
    base, model, found = build.weights(shared_models / "base"), build.weights(merged), load_file(out)
    assert found.keys() == set(build.SELECTED)
    assert all(build.same_bits(base[name] + found[name], model[name]) for name in found)


def test_the_forecast_as_flat_rows(merged, tmp_path, nufilt):
    for step in (None, 2):
        out = tmp_path / f"forecast-{step}.json"
        assert (
            nufilt("export", merged, "--what", "forecast", "--out", out, *([] if step is None else ["--step", 2])).code
            == 0
        )
        rows = json.loads(out.read_text())["rows"]
        told = json.loads((merged / "forecast.json").read_text())["steps"]
        steps = range(1, 4) if step is None else [2]
        assert [row["step"] for row in rows] == [n for n in steps for _ in told[n - 1]["layers"]]
        row = next(row for row in rows if row["layer"] == build.Q0 and row["step"] == 2)
        assert row["task"] == "beta" and row["drift"] == told[1]["layers"][build.Q0]["drift"]
        assert row["near_equal_cut"] == (build.Q0 in told[1]["near_equal_cuts"])


def run_module(path, *arrays):
    """A StableHLO module on the device at hand, read without this package."""
    from jax.extend import backend
    from jaxlib import xla_client

    options = backend.get_compile_options(num_replicas=1, num_partitions=1)
    devices = xla_client.DeviceList(tuple(jax.devices()[:1]))
    program = backend.get_backend().compile_and_load(path.read_bytes(), devices, options)
    return [x[0] for x in program.execute_sharded(arrays).disassemble_into_single_device_arrays()]


def test_the_solve_for_other_programs(merged, tmp_path, nufilt):
    out = tmp_path / "solve"
    result = nufilt("export", merged, "--what", "stablehlo", "--out", out)
    assert result.code == 0, result.err
    document = json.loads((out / "solve.json").read_text())
    modules = document["modules"]
    assert {row["platform"] for row in modules} == {"cpu", "cuda", "tpu"}
    assert {row["file"] for row in modules} == {path.name for path in out.iterdir()} - {"solve.json"}
    assert {name for row in modules for name in row["layers"]} == set(build.SELECTED)
    config = NufiltConfig(**document["config"])
    module = next(row for row in modules if row["platform"] == "cpu")
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(0.1 * rng.standard_normal(x["shape"]), x["dtype"]) for x in module["arguments"]]
    wanted = solve_stack(*arrays[:2], config=config, adapter_init=arrays[2])
    with jax.transfer_guard("allow"):
        found = run_module(out / module["file"], *arrays)
    assert [list(x.shape) for x in found] == [x["shape"] for x in module["results"]]
    np.testing.assert_allclose(found[0], wanted.update, atol=1e-5)
    np.testing.assert_allclose(found[1], wanted.losses, rtol=1e-4)
    assert np.asarray(found[2]).all()


def test_the_page_reads_what_it_exports(merged, tmp_path, nufilt, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "how_to" / "verify.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exports = [line.partition("#")[0].split() for line in page.splitlines() if line.startswith("nufilt export merged")]
    assert {argv[argv.index("--what") + 1] for argv in exports} == set(PARTS)
    for _, command, _, *options in exports:
        assert nufilt(command, merged, *options).code == 0
    # In a process of its own: here LAPACK has been used already.
    kept = """
    import numpy
    numpy.savez("found.npz", *arrays, update=update, losses=losses, is_finite=is_finite)
    print(json.dumps([sorted(tau), sorted(delta), sorted({row["layer"] for row in rows})]))
    """
    snippets = [*re.findall(r"```python\n(.*?)```", page, re.DOTALL), textwrap.dedent(kept)]
    run = subprocess.run([sys.executable, "-c", "\n".join(snippets)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == 3 * [sorted(build.SELECTED)]
    with np.load("found.npz") as found:
        merged_before, task, start = (jnp.asarray(found[f"arr_{i}"]) for i in range(3))
        config = NufiltConfig(**json.loads((tmp_path / "solve" / "solve.json").read_text())["config"])
        wanted = solve_stack(merged_before, task, config=config, adapter_init=start)
        np.testing.assert_allclose(found["losses"], wanted.losses, rtol=1e-4)
        assert found["update"].shape == wanted.update.shape and found["is_finite"].all()


@pytest.mark.parametrize("name", ["verify.md", "continue.md"])
def test_the_tolerance_is_told_in_numbers(name):
    text = (Path(__file__).parents[2] / "docs" / "how_to" / name).read_text(encoding="utf-8")
    told = {float(number) for number in re.findall(r"\b\de-\d\b", text)}
    assert told == {sameness.TOLERANCE, sameness.TOLERANCE_AT_NEAR_EQUAL_CUTS}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--what", "dlta"), "--what: must be one of tau, delta, forecast, stablehlo, got 'dlta'"),
        (("--what", "tau", "--step", "4"), "--step: must be from 1 to 3, the steps of this merge, got 4"),
        (("--what", "forecast", "--step", "0"), "--step: must be from 1 to 3, the steps of this merge, got 0"),
        (
            ("--what", "delta", "--step", "2"),
            "--step: the state of this merge is that after step 3, got 2 (merge the first 2 tasks into another folder)",
        ),
        (
            ("--what", "delta", "--step", "1"),
            "--step: the state of this merge is that after step 3, got 1 (merge the first task into another folder)",
        ),
        (("--what", "stablehlo", "--step", "1"), "--step: stablehlo is of no step (leave it out)"),
    ],
)
def test_what_cannot_be_exported(merged, tmp_path, refused, options, what):
    assert refused("export", merged, "--out", tmp_path / "x", *options) == [f"nufilt: {what}"]


def test_nothing_is_overwritten(merged, tmp_path, refused):
    (tmp_path / "x").write_text("mine")
    (line,) = refused("export", merged, "--out", tmp_path / "x", "--what", "delta")
    assert line.startswith(f"nufilt: {tmp_path / 'x'}: exists: nothing is overwritten")
    (line,) = refused("export", merged, "--out", tmp_path / "none" / "x", "--what", "forecast")
    assert line.startswith(f"nufilt: {tmp_path / 'none'}") and "cannot be written" in line
    (line,) = refused("export", tmp_path, "--out", tmp_path / "y", "--what", "delta")
    assert "holds no finished merge" in line


def test_a_task_that_changed_gives_no_task_vector(models, tmp_path, nufilt, command):
    out = tmp_path / "out"
    assert nufilt(*command(models, out, "--method", "sum", n=2)).code == 0
    shutil.copy(models / "gamma" / "model.safetensors", models / "beta" / "model.safetensors")
    result = nufilt("export", out, "--what", "tau", "--out", tmp_path / "x")
    assert result.code == 1 and f"nufilt: {models / 'beta'}: has changed since the merge in {out} began" in result.err
    result = nufilt("export", out, "--what", "stablehlo", "--out", tmp_path / "x")
    assert result.code == 1 and "--what: sum has no solve that is compiled by layers" in result.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("what", ["tau", "delta", "stablehlo"])
def test_what_needs_the_state_is_refused_without_it(merged, tmp_path, refused, what):
    """As in a folder that was pushed."""
    shutil.copytree(merged, tmp_path / "copy", ignore=shutil.ignore_patterns("state"))
    [line] = refused("export", tmp_path / "copy", "--what", what, "--out", tmp_path / "part")
    assert f"state: holds 0 of the {len(build.SELECTED)} layers that were merged (" in line
    assert not (tmp_path / "part").exists()
