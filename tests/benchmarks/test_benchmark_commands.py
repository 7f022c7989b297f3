"""Models on disk, and commands of this version and of another: a checkout that only tells what it was asked."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.common import commands, models, records
from nufilt_jax.engine import memory


def test_the_models_have_true_sizes():
    assert models.Tower().n_bytes == 4 * 87_456_000  # CLIP ViT-B/32's, position_ids apart
    assert len(models.Tower().shapes()) == 199
    llama = models.Llama(32, 48, 1, 64)
    assert models.n_parameters(llama) == 64 * 32 + 4 * 32 * 32 + 3 * 48 * 32 + 2 * 32
    assert models.about(llama)["float32_bytes"] == 4 * models.about(llama)["parameters"]


@pytest.mark.parametrize("dtype", models.STORED)
def test_models_are_the_same_whenever_they_are_written(dtype, tmp_path):
    tower = models.Tower(width=32, blocks=1, dtype=dtype)
    for folder, task in (("base", None), ("task", 1), ("again", 1), ("other", 2)):
        models.write_model(tmp_path / folder, tower, task)
    base, task, again, other = (
        load_file(tmp_path / folder / models.WEIGHTS) for folder in ("base", "task", "again", "other")
    )
    assert {name: x.shape for name, x in base.items()} == tower.shapes()
    assert {str(x.dtype) for x in base.values()} == {dtype}
    for name, x in base.items():
        np.testing.assert_array_equal(task[name], again[name])
        assert not np.array_equal(task[name], other[name])
        assert 0 < np.abs(task[name].astype(np.float32) - x.astype(np.float32)).max() < 0.1


def test_task_vectors_have_a_power_law_spectrum_in_every_task():
    first, second = (models.task_vector("a", (48, 32), task) for task in (0, 1))
    spectra = [np.linalg.svd(x, compute_uv=False) for x in (first, second)]
    np.testing.assert_allclose(spectra[0], spectra[0][0] * np.arange(1.0, 33) ** -0.6, rtol=1e-3)
    np.testing.assert_allclose(*spectra, rtol=1e-3)
    assert abs(np.vdot(first, second)) < 0.5 * np.vdot(first, first)


def test_a_folder_keeps_models_of_one_size(tmp_path):
    small = models.Llama(8, 8, 1, 8)
    models.write_models(tmp_path / "models", small, 1)
    found = {path.name for path in (tmp_path / "models").iterdir()}
    assert found == {models.SIZES, "base", "task00"}
    before = (tmp_path / "models" / "base" / models.WEIGHTS).stat().st_mtime_ns
    models.write_models(tmp_path / "models", small, 1)
    assert (tmp_path / "models" / "base" / models.WEIGHTS).stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="choose another --folder"):
        models.write_models(tmp_path / "models", small._replace(width=16), 1)
    with pytest.raises(SystemExit, match="choose another --folder"):
        models.write_models(tmp_path, small, 1)


def test_another_version_runs_where_it_stands(stub, tmp_path):
    [before, now] = commands.versions(stub)
    assert (now.root, before.root) == (records.ROOT, stub)
    assert before.name != now.name
    found = commands.merge(tmp_path, commands.sources(tmp_path, 2), before)
    assert [step["task"] for step in found.document["steps"]] == ["task00", "task01"]
    assert found.wall > 0 and found.processor > 0 and found.peak > 2**20
    assert not (tmp_path / "out").exists()
    assert commands.solve_seconds(found) == 4.0 and commands.compiled(found, "programs") == 0  # it tells of none


def test_what_compiles_in_the_background_is_no_part_of_the_solves():
    steps = [{"timings": {"solve": 2.0}}, {"timings": {"solve": 3.0, "compile": 0.5}}]
    found = commands.Run(9.0, 0.0, 0, json.dumps({"steps": steps, "compiled": {"seconds": 6.0}}))
    assert (commands.compile_seconds(found), commands.solve_seconds(found)) == (0.5, 4.5)
    assert commands.estimate_cells({}, found)[1:6:2] == [4.0, 4.5, 0.5]


def test_a_command_that_fails_says_why(stub, tmp_path):
    before = commands.versions(stub)[0]
    with pytest.raises(commands.FailedError, match=r"--fail --out .*ended with status 1: nufilt: why") as left:
        commands.merge(tmp_path, ["--fail"], before)
    assert left.value.status == 1
    assert commands.run([*commands.MERGE, "--model"], before, tmp_path, status=2).told == ""


def test_the_peak_is_the_commands_own(tmp_path):
    held = memory.peak_memory()
    assert held is not None and held > 2**26  # of JAX alone
    found = commands.run(["-c", "print('told')"], commands.versions(None)[0], tmp_path)
    assert found.told == "told\n" and found.peak < held / 2


def test_versions_take_turns():
    order, versions = [], [commands.Version(name, records.ROOT) for name in ("a", "b")]

    def call(version):
        order.append(version.name)
        return len(order)

    assert commands.alternating(versions, 2, call) == {"a": [1, 3], "b": [2, 4]}
    assert order == ["a", "b", "a", "b"]


def test_an_estimate_stands_beside_the_run():
    steps = [{"timings": {"solve": 3.0}}, {"timings": {"solve": 2.0}}]
    told = json.dumps({"steps": steps, "compiled": {"seconds": 1.0}})
    run = commands.Run(wall=7.0, processor=0.0, peak=0, told=told)
    plan = {"seconds": {"files": 4.0, "merging": 5.0, "compiling": 6.0}}
    assert commands.estimate_cells(plan, run) == [4.0, 2.0, 5.0, 4.0, 6.0, 1.0, 1.5]
    unknown = {"seconds": {"files": 4.0, "merging": None, "compiling": None}}
    assert commands.estimate_cells(unknown, run) == [4.0, 2.0, None, 4.0, None, 1.0, None]


@pytest.mark.parametrize("text", ["/nowhere", str(records.ROOT / "tests")])
def test_a_checkout_holds_the_package(text):
    with pytest.raises(commands.argparse.ArgumentTypeError, match="holds no checkout"):
        commands.checkout(text)
    assert commands.checkout(str(records.ROOT)) == records.ROOT
