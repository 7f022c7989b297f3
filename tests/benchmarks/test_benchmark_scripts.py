"""Each script from its arguments to its results, at the smallest sizes that do something."""

import json
import re

import numpy as np
import pytest

from benchmarks.common import measure, records, shapes
from benchmarks.speed import (
    accelerator,
    cold_start,
    decompositions,
    end_to_end,
    lora,
    memory,
    methods,
    precision,
    products,
    small_decompositions,
    solve,
    steps,
    tpu_compile,
    whole_model_out,
)

SCRIPTS = {"solve": solve, "decompositions": decompositions, "steps": steps, "methods": methods, "lora": lora}
SCRIPTS |= {"tpu_compile": tpu_compile, "cold_start": cold_start, "end_to_end": end_to_end, "memory": memory}
SCRIPTS |= {"accelerator": accelerator, "products": products, "whole_model_out": whole_model_out}
SCRIPTS |= {"precision": precision, "small_decompositions": small_decompositions}
TINY = (shapes.Tower("vision_model.encoder.layers.{}.", 2, {"a.weight": (40, 32), "b.weight": (32, 32)}),)


def call(script, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", [f"{script}.py", *map(str, arguments)])
    SCRIPTS[script].main()


def refused(script, monkeypatch, capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        call(script, monkeypatch, *arguments)
    return left.value.code, capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_option(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        call(script, monkeypatch, "--help")
    told = capsys.readouterr().out
    assert left.value.code == 0
    for option in re.findall(r"^  (--[a-z-]+)", told, re.MULTILINE):
        assert re.search(rf"^  {option}\b.*\s{{2,}}\w|^  {option}\b.*\n\s{{10,}}\w", told, re.MULTILINE), option


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("solve", ["--model", "gpt"], "argument --model: invalid choice: 'gpt'"),
        ("solve", ["--model", "vit-b32", "--repeats", "0"], "argument --repeats: must be at least 1, got 0"),
        ("solve", ["--model", "vit-b32", "--layers", "two"], "argument --layers: invalid whole_number value: 'two'"),
        ("decompositions", ["--routes", "qr"], "argument --routes: invalid choice: 'qr'"),
        ("cold_start", ["--before", "/"], "argument --before: / holds no checkout of nufilt_jax"),
        ("end_to_end", ["--repeat", "0"], "argument --repeat: must be at least 1, got 0"),
        ("memory", ["--model", "vit-b32", "--inner", "8"], "argument --inner: a vit-b32 has none"),
        ("memory", ["--max-memory", "8XB"], "argument --max-memory: must be a size as 8GB or 8GiB"),
        ("steps", ["--tasks", "1"], "argument --tasks: must be at least 2, got 1"),
    ],
)
def test_wrong_usage_is_one_line(script, arguments, message, monkeypatch, capsys):
    code, told = refused(script, monkeypatch, capsys, *arguments)
    assert code == 2
    assert told.startswith(f"{script}.py: {message}") and told.count("\n") == 1


def test_missing_torch_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(solve.importlib.util, "find_spec", lambda name: None)
    code, told = refused("solve", monkeypatch, capsys, "--model", "vit-b32", "--against", "torch")
    assert (code, told) == (1, "solve.py: --against: PyTorch is not installed (pip install torch)\n")


def test_solve(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(shapes.MODELS, "vit-b32", TINY)
    monkeypatch.setattr(measure, "machine_rates", lambda: measure.Machine(100.0, 10.0))
    out = tmp_path / "solve.json"
    quickly = ("--layers", 1, "--decomposition", "svd")
    call("solve", monkeypatch, "--model", "vit-b32", *quickly, "--repeats", 2, "--tasks", 2, "--json", out)
    stored = json.loads(out.read_text())
    assert capsys.readouterr().out.strip() == records.markdown(stored)
    assert stored["layers"] == {"32x32": 1, "40x32": 1}
    assert stored["settings"]["layers"] == 1
    titles = [table["title"] for table in stored["tables"]]
    assert titles[0] == "One task's solve, vit-b32, 1 blocks of each tower"
    stages = records.rows(stored, titles[1])
    assert [row["stage"] for row in stages] == ["decompose D", "decompose τ", "reduce", "adam", "fuse"]
    assert all(row["GFLOP"] > 0 and row["min s"] <= row["median s"] for row in stages)
    [plain] = records.rows(stored, "Relative difference of our updates")
    assert plain["contender"] == "nufilt_jax, svd" and plain["max"] < 5e-5
    [merge] = records.rows(stored, "Merge in memory")
    assert merge["tasks"] == 2


def test_decompositions(monkeypatch, tmp_path):
    out = tmp_path / "decompositions.json"
    monkeypatch.setattr(decompositions, "DIRECTIONS", {"V2": 4})
    routes = ("svd", "subspace", "cholqr", "lobpcg")  # eigh shares its code with subspace
    case = ("--n", 25, "--batch", 2, "--spectra", "k^-1", "--routes", *routes)
    call("decompositions", monkeypatch, *case, "--repeats", 1, "--json", out)
    rows = records.rows(json.loads(out.read_text()), "V2: 4 directions")
    assert tuple(row["route"] for row in rows) == routes
    for row in rows:
        assert (row["n"], row["batch"], row["reference"], row["remark"]) == (25, 2, "float64", "")
        assert row["projector error"] < 1e-3 and row["captured energy"] == pytest.approx(1, abs=1e-5)
    assert [row["certified"] for row in rows] == ["2 of 2"] * 2 + [None] * 2


@pytest.mark.parametrize("spectrum", decompositions.SPECTRA)
def test_large_matrices_have_a_reference_too(spectrum, monkeypatch):
    exact = decompositions.case(20, 1, spectrum)
    monkeypatch.setattr(decompositions, "LARGEST_FLOAT64", 19)
    large = decompositions.case(20, 1, spectrum)
    assert (exact.reference, large.reference) == ("float64", "svd" if spectrum == "flat" else "as built")
    if large.truth is not None:
        angle, energy = decompositions.errors(exact.matrices[0], large.truth[:, :4], exact.truth[:, :4])
        assert angle < 1e-5 and energy == pytest.approx(1)


def test_a_route_that_cannot_run_says_why():
    row, vectors = decompositions.Bench(1, 1.0).row(decompositions.case(20, 1, "flat"), "lobpcg", 4)
    assert row[-1] == "needs n > 20" and vectors is None


def test_a_route_beyond_the_budget_is_left_out():
    bench = decompositions.Bench(repeats=1, budget=1e-9)
    case = decompositions.case(8, 1, "flat")
    first, vectors = bench.row(case, "svd", 2)
    second, nothing = bench.row(case, "svd", 2)
    assert vectors.shape == (8, 2) and nothing is None
    assert first[-1] == "" and second[-1].startswith("left out: about 1 s")


def test_errors_of_directions():
    x = np.diag([3.0, 2.0, 1.0])
    eye = np.eye(3)
    assert decompositions.errors(x, eye[:, :2], eye[:, :2]) == (0.0, 1.0)
    angle, energy = decompositions.errors(x, eye[:, [0, 2]], eye[:, :2])
    assert angle == pytest.approx(1) and energy == pytest.approx(10 / 13)


def test_steps(monkeypatch, tmp_path):
    monkeypatch.setitem(shapes.MODELS, "vit-b32", TINY)
    monkeypatch.setattr(steps, "_seconds", lambda tasks, config, repeats: (config.steps / 10, 10.0 * len(tasks)))
    out = tmp_path / "steps.json"
    call("steps", monkeypatch, "--iterations", 2, 3, "--tasks", 3, "--layers", 1, "--json", out)
    stored = json.loads(out.read_text())
    [title] = [table["title"] for table in stored["tables"]]
    rows = records.rows(stored, title)
    ours = [row for row in rows if row["method"] == "nufilt_jax"]
    assert [(row["iterations"], row["solve s"], row["total s"]) for row in ours] == [(2, 0.2, 20), (3, 0.3, 20)]
    published = {row["iterations"]: row["total s"] for row in rows if row["method"] == "NUFILT"}
    assert published == {25: 129.8, 50: 138.9, 100: 156.4}


def test_products(monkeypatch, tmp_path):
    monkeypatch.setattr(products, "SHAPES", [(2, 8, 16, 4)])
    out = tmp_path / "products.json"
    call("products", monkeypatch, "--repeats", 1, "--json", out)
    rows = {row["algorithm"]: row for row in records.rows(json.loads(out.read_text()), products.TITLE)}
    assert tuple(rows) == (products.HIGHEST, *products.PRESETS)
    assert rows[products.HIGHEST]["relative error"] < 1e-6 and rows[products.HIGHEST]["min ms"] > 0
    for row in rows.values():  # each ran, or says why not
        assert (row["relative error"] is None) == bool(row["remark"])


def test_precision(monkeypatch, tmp_path):
    """By stage, an algorithm that a CPU has, and one that it has not."""
    monkeypatch.setitem(shapes.MODELS, "vit-b32", TINY)
    monkeypatch.setattr(precision, "STAGES", {name: precision.STAGES[name] for name in ("gram", "adam")})
    out = tmp_path / "precision.json"
    algorithms = ("--algorithms", "F32_F32_F32", "TF32_TF32_F32_X3")
    call("precision", monkeypatch, "--repeats", 1, *algorithms, "--json", out)
    rows = records.rows(json.loads(out.read_text()), precision.TITLE)
    told = [(row["products of"], row["algorithm"]) for row in rows]
    every = [(precision.ALL, name) for name in (products.HIGHEST, *algorithms[1:])]
    assert told == [*every, *((stage, name) for name in algorithms[1:] for stage in ("gram", "adam"))]
    for row in rows:
        if row["algorithm"] in (products.HIGHEST, "F32_F32_F32"):
            assert row["largest difference"] < 1e-5 and row["certified layers"] == 4 and row["min ms"] > 0
        else:  # each ran, or says why not
            assert (row["min ms"] is None) == bool(row["remark"])


def test_products_of_a_stage_alone_are_traced_otherwise(monkeypatch):
    found = []
    monkeypatch.setattr(precision.solve, "train", lambda: found.append(precision.dense.PRECISION))
    with precision.products_by("F32_F32_F32", ("adam",)):
        precision.solve.train()
        found.append(precision.dense.PRECISION)
    assert found == [products.precision_of("F32_F32_F32"), products.precision_of(products.HIGHEST)]


def test_small_decompositions(monkeypatch, tmp_path):
    monkeypatch.setattr(small_decompositions, "SIZES", [(2, 8)])
    out = tmp_path / "small.json"
    call("small_decompositions", monkeypatch, "--repeats", 1, "--json", out)
    rows = records.rows(json.loads(out.read_text()), small_decompositions.TITLE)
    assert {(row["what"], row["algorithm"]) for row in rows} == set(small_decompositions.DECOMPOSITIONS)
    for row in rows:
        assert (row["min ms"] is None) == bool(row["remark"])
        assert row["algorithm"] != "default" or row["min ms"] > 0


def test_stages_of_an_accelerator(monkeypatch, capsys, tmp_path):
    """What passed is kept, what failed or did not fit is named."""
    one = {"environment": measure.environment(), "tables": [records.table("Title", ["x"], [[1]])]}
    writes = f"import sys, pathlib\npathlib.Path(sys.argv[2]).write_text({json.dumps(one)!r})"
    for name, text in {"write": writes, "fail": "raise SystemExit('why')"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(accelerator, "STAGES", {"good": ("write",), "bad": ("fail",)})
    out = tmp_path / "out.json"
    assert refused("accelerator", monkeypatch, capsys, "--all", "--json", out) == (
        1,
        "accelerator.py: bad: status 1: why\n",
    )
    stored = json.loads(out.read_text())
    outcomes = {row["stage"]: row["outcome"] for row in records.rows(stored, accelerator.TITLE)}
    assert outcomes == {"good": "passed", "bad": "status 1: why"}
    assert records.rows(stored, "good: Title") == [{"x": 1}]
    assert accelerator.run_stage("late", ("write",), 0) == (None, "not run: no time was left", None)
    monkeypatch.setattr(accelerator.subprocess, "run", lambda command, timeout, **how: stopped(command, timeout))
    assert accelerator.run_stage("long", ("wait",), 7).outcome == "stopped after 7 s"


def stopped(command, timeout):
    raise accelerator.subprocess.TimeoutExpired(command, timeout)


def test_lora(monkeypatch, capsys, tmp_path):
    """The command in factors and the dense solve see the same adapters, and both are timed."""
    monkeypatch.setattr(measure, "machine_rates", lambda: measure.Machine(100.0, 10.0))
    monkeypatch.setattr(lora, "SOLVERS", ("closed_form",))
    out = tmp_path / "lora.json"
    sizes = ("--blocks", 1, "--few", 1, "--width", 32, "--hidden", 48, "--rank", 2, "--tasks", 3)
    call("lora", monkeypatch, *sizes, "--json", out)
    stored = json.loads(out.read_text())
    assert capsys.readouterr().out.strip() == records.markdown(stored)
    rows = records.rows(stored, "3 adapters of rank 2, layers 32 and 48 wide")
    assert [(row["how"], row["blocks"]) for row in rows] == [("in factors, the command", 1), ("materialised", 1)]
    assert all(row["min s / task"] > 0 and row["peak GiB"] > 0.05 for row in rows)
    assert stored["ratios"][0]["times faster"] > 0


def test_whole_model_out(monkeypatch, capsys, tmp_path):
    out = tmp_path / "whole.json"
    sizes = ("--blocks", 1, "--width", 32, "--hidden", 48, "--rank", 2, "--tasks", 2)
    call("whole_model_out", monkeypatch, *sizes, "--json", out)
    stored = json.loads(out.read_text())
    assert capsys.readouterr().out.strip() == records.markdown(stored)
    [row] = records.rows(stored, "a whole model out of 2 adapters of rank 2")
    assert row["% of copy rate"] == pytest.approx(100 * row["copy s"] / row["write model s"])
    assert row["GB"] == pytest.approx(2e-9 * (256 * 32 + 4 * 32**2 + 3 * 32 * 48 + 2 * 32), abs=1e-5)


def test_methods(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measure, "machine_rates", lambda: measure.Machine(100.0, 10.0))
    out = tmp_path / "methods.json"
    chosen = ("weight_average", "iso_c", "wemoe")
    call("methods", monkeypatch, "--methods", *chosen, "--blocks", 1, "--width", 64, "--repeats", 1, "--json", out)
    stored = json.loads(out.read_text())
    assert capsys.readouterr().out.strip() == records.markdown(stored)
    rows = {
        row["method"]: row for row in records.rows(stored, "One task by every method, a tower of 1 blocks, 64 wide")
    }
    assert tuple(rows) == chosen
    assert all(row["min s"] > 0 and row["peak GiB"] > 0.05 for row in rows.values())
    # Three numbers of 4 bytes per weight, at the rate that the machine is said to copy with.
    n_numbers = sum(np.prod(shape) for shape in methods.Tower(width=64, blocks=1).shapes().values())
    assert rows["weight_average"]["GB/s"] == pytest.approx(12e-9 * n_numbers / rows["weight_average"]["min s"])
    assert rows["weight_average"]["% of copy rate"] == pytest.approx(10 * rows["weight_average"]["GB/s"])
    assert rows["iso_c"]["GB/s"] is rows["wemoe"]["GB/s"] is None
