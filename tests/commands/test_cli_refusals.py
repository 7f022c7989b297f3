"""Bad input: one line per problem, exit 1, nothing left behind; wrong usage: exit 2."""

import json
import re
import shutil

import model_builders as build
import numpy as np
import pytest

from nufilt_jax.errors import Problem, SolveError

LINE = re.compile(r"^nufilt: [^:]+: .+$")


def replace(folder, tensors):
    """Other tensors in a model folder."""
    shutil.rmtree(folder)
    build.write(folder, tensors)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("merge --base b --task -x=t1", "--task: -x=t1 begins as an option does (say --task=-x=t1)"),
        ("plan --base", 'Command "plan" parameter --base requires an argument. (see nufilt plan --help)'),
        ("merge --base --out o", 'Command "merge" parameter --base requires an argument. (see nufilt merge --help)'),
        ("evaluate m --zork", "Unknown option: --zork. (see nufilt evaluate --help)"),
        (
            "add m --config f.toml",
            "--config: add takes no configuration file (base, earlier tasks and settings are those of the merge)",
        ),
        ("verify m --config=f", "--config: verify takes no configuration file (see nufilt verify --help)"),
        ("plan --processes 2", "--processes: is an option of merge, and not of plan (see nufilt plan --help)"),
        ("export m", 'Command "export" parameter --what requires an argument. (see nufilt export --help)'),
    ],
)
def test_wrong_usage_names_the_help_that_is_meant(line, said, refused):
    assert refused(*line.split(), code=2) == [f"nufilt: {said}"]


def test_missing_folder(models, tmp_path, refused, command):
    shutil.rmtree(models / "beta")
    (line,) = refused(*command(models, tmp_path / "out"))
    assert line.startswith(f"nufilt: {models / 'beta'}: there is no such folder") and line.endswith(")")


@pytest.mark.parametrize("name", ["base", "beta"])
@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_weights(models, tmp_path, refused, command, name, keep):
    path = models / name / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    (line,) = refused(*command(models, tmp_path / "out"))
    assert str(path) in line and LINE.match(line)


def test_shape_mismatch(models, tmp_path, refused, command):
    tensors = build.weights(models / "beta")
    replace(models / "beta", tensors | {build.Q0: np.zeros((4, build.WIDTH), np.float32)})
    (line,) = refused(*command(models, tmp_path / "out"))
    assert line.startswith(f"nufilt: {models / 'beta' / 'model.safetensors'}: {build.Q0}: ")
    assert "[4, 16]" in line and "[16, 16]" in line


def test_missing_tensor(models, tmp_path, refused, command):
    tensors = build.weights(models / "beta")
    replace(models / "beta", {name: x for name, x in tensors.items() if name != build.Q0})
    (line,) = refused(*command(models, tmp_path / "out"))
    assert line.startswith(f"nufilt: {models / 'beta'}: {build.Q0}: is missing")


def test_tensor_that_the_base_lacks(models, tmp_path, refused, command):
    tensors = build.weights(models / "beta")
    replace(models / "beta", tensors | {"adapter.weight": np.zeros((2, 2), np.float32)})
    (line,) = refused(*command(models, tmp_path / "out"))
    assert line.startswith(f"nufilt: {models / 'beta'}: adapter.weight: is not in the base")


@pytest.mark.parametrize("name", ["base", "gamma"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(models, tmp_path, refused, command, name, value):
    tensors = build.weights(models / name)
    tensors[build.Q0][3, 3] = value
    replace(models / name, tensors)
    (line,) = refused(*command(models, tmp_path / "deep" / "out"))
    assert line.startswith(f"nufilt: {models / name / 'model.safetensors'}: {build.Q0}: has NaN or infinite numbers")


def test_not_finite_where_nothing_is_merged(models, tmp_path, nufilt, command):
    tensors = build.weights(models / "beta")
    tensors[build.FC2][0, 0] = np.nan
    replace(models / "beta", tensors)
    result = nufilt(*command(models, tmp_path / "out"))
    assert (result.code, len(result.lines)) == (0, 1)
    assert result.err.startswith(f"nufilt: warning: {models / 'beta' / 'model.safetensors'}: {build.FC2}: ")
    assert result.err.endswith("has NaN or infinite numbers; the merge does not touch it\n")
    result = nufilt(*command(models, tmp_path / "other", "--other-params", "average"))
    way_out = "(fine-tune again, or keep the base's with --other-params pretrained)"
    assert (result.code, result.lines[0].endswith(f"has NaN or infinite numbers {way_out}")) == (1, True), result.err


def test_pickle_only(models, tmp_path, refused, command):
    (models / "beta" / "model.safetensors").rename(models / "beta" / "pytorch_model.bin")
    (line,) = refused(*command(models, tmp_path / "out"))
    assert line.startswith(f"nufilt: {models / 'beta'}/pytorch_model.bin: is a pickle")
    assert "save_pretrained" in line


def test_base_without_config(models, tmp_path, refused, command):
    (models / "base" / "config.json").unlink()
    (line,) = refused(*command(models, tmp_path / "out"))
    assert line.startswith(f"nufilt: {models / 'base'}: has no config.json")


BAD_VALUES = {
    "unknown method": (("--method", "ties2"), "--method: 'ties2' is not known"),
    "negative rank": (("--filter-rank", "-1"), "--filter-rank: must be at least 0, got -1"),
    "negative adapter rank": (("--adapter-rank", "-2"), "--adapter-rank: must be at least 0, got -2"),
    "negative steps": (("--steps", "-3"), "--steps: must be at least 0, got -3"),
    "learning rate 0": (("--learning-rate", "0"), "--learning-rate: must be above 0, got 0.0"),
    "learning rate nan": (("--learning-rate", "nan"), "--learning-rate: must be a finite number, got nan"),
    "seed": (("--seed", "-1"), "--seed: must be at least 0, got -1"),
    "large seed": (("--seed", str(2**63)), f"--seed: must be below 2^63, got {2**63}"),
    "no selected layer": (("--layers", "nothing_like_it"), "--layers: no matrix matches 'nothing_like_it'"),
    "broken regex": (("--layers", "(q_proj"), "--layers: '(q_proj' is no regular expression"),
    "unknown setting": (("--method-args", "scale=1"), "--method-args: nufilt has no setting 'scale'"),
    "bad setting": (("--method-args", "steps=many"), "--method-args: steps must be a whole number, got 'many'"),
    "no setting": (("--method-args", "steps"), "--method-args: 'steps' is not of the form KEY=VALUE"),
    "bad first task": (("--method-args", "first_task=x"), "--method-args: first_task must be one of paper, authors"),
    "nan scale": (
        ("--method", "task_arithmetic", "--method-args", "scale=nan"),
        "--method-args: scale must be a finite number, got nan",
    ),
    "other params": (("--other-params", "zero"), "--other-params: must be one of pretrained, first, average"),
    "dtype": (("--dtype", "int8"), "--dtype: must be one of float32, bfloat16, float16, got 'int8'"),
    "format": (("--format", "gguf"), "--format: must be one of safetensors, flax, msgpack, got 'gguf'"),
    "decomposition": (("--decomposition", "qr"), "--decomposition: must be one of auto, eigh, svd, subspace"),
    "order": (("--order", "first"), "--order: must be a number from 1 or 'given', got 'first'"),
    "devices": (("--devices", "0"), "--devices: must be at least 1, got 0"),
    "more devices": (("--devices", "2"), "--devices: 2 are asked for, and this process has 1 (cpu)"),
    "memory": (("--max-memory", "8 apples"), "--max-memory: must be a size as 8GB or 8GiB, got '8 apples'"),
    "no memory": (("--max-memory", "1MB"), "--max-memory: 0.00 GB are too little: layer by layer this merge takes "),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_refused_value(shared_models, tmp_path, refused, case):
    options, expected = BAD_VALUES[case]
    models = shared_models
    task = ("--task", f"alpha={models / 'alpha'}")
    argv = ("--base", models / "base", *task, *options)
    (line,) = refused("merge", *argv, "--out", tmp_path / "out")
    assert line.startswith(f"nufilt: {expected}")
    assert refused("plan", *argv) == [line]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--model", "vit-b33"), "--model: unknown model 'vit-b33'"),
        (
            ("--model", "llava-1.5-7b", "--task", "a=b", "--group", "8"),
            "--group: llava-1.5-7b has one group of tasks only",
        ),
        (("--model", "flan-t5-base", "--group", "8"), "--group: flan-t5-base has one group of tasks only"),
        (("--model", "flan-t5-base", "--preset-table", "3"), "--preset-table: must be 2, got 3"),
        (("--model", "vit-b32", "--preset-table", "2"), "--preset-table: belongs to --model flan-t5-base"),
        (("--model", "vit-b32", "--group", "9"), "--group: 9 is no task group"),
        (("--model", "vit-b32", "--order", "11"), "--order: the paper has orders 1 to 10, got 11"),
        (("--model", "tiny", "--group", "8"), "--group: tiny has one group of tasks only"),
    ],
)
def test_refused_preset(refused, tmp_path, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    (line,) = refused("merge", *options)
    assert line.startswith(f"nufilt: {expected}")


def test_duplicate_names(shared_models, tmp_path, refused):
    tasks = [part for name in ("alpha", "beta") for part in ("--task", f"same={shared_models / name}")]
    (line,) = refused("merge", "--base", shared_models / "base", *tasks, "--out", tmp_path / "out")
    assert line.startswith("nufilt: --task: same names two tasks")


def test_all_problems_at_once(models, tmp_path, refused, command):
    shutil.rmtree(models / "alpha")
    beta = build.weights(models / "beta")
    replace(models / "beta", beta | {build.Q0: np.zeros((2, 2), np.float32), build.FC1: np.zeros((3, 3), np.float32)})
    (models / "gamma" / "model.safetensors").write_bytes(b"short")
    bad = ("--seed", "-1", "--dtype", "int8", "--method-args", "nope=1", "learning_rate=-1", "--layers", ".*weight")
    argv = [part if part != "4" else "-4" for part in command(models, tmp_path / "out", *bad)]
    lines = refused(*argv)
    wanted = ["--seed", "--dtype", "--method-args: nufilt", "--learning-rate", "--filter-rank", "--steps"]
    wanted += [str(models / "alpha"), build.Q0, build.FC1, str(models / "gamma")]
    assert [sum(what in line for line in lines) for what in wanted] == [1] * len(wanted), lines
    assert len(lines) == len(wanted)


def test_all_problems_of_a_preset_at_once(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = refused("merge", "--model", "vit-l14", "--group", "9", "--order", "77", "--seed", "-1")
    assert [line.split(": ")[1] for line in sorted(lines)] == ["--group", "--order", "--seed"]


def test_output_format_that_the_model_does_not_have(tmp_path, refused):
    weight = {"model.layers.0.self_attn.q_proj.weight": np.ones((4, 4), np.float32)}
    for name in ("base", "alpha"):
        build.write(tmp_path / name, weight, model_type="llama")
    argv = ("--base", tmp_path / "base", "--task", f"alpha={tmp_path / 'alpha'}", "--format", "flax")
    (line,) = refused("merge", *argv, "--out", tmp_path / "out")
    assert line.startswith("nufilt: --format: ") and "no Flax form" in line
    assert refused("plan", *argv) == [line]


def test_solution_that_is_not_finite(models, tmp_path, nufilt, command):
    out = tmp_path / "out"
    argv = command(models, out, "--learning-rate", "1e38")
    failed = nufilt(*argv)
    path, more = models / "beta" / "model.safetensors", len(build.SELECTED) - 1
    kept = f"lower --learning-rate; what is merged is kept in {out}.partial"
    assert failed.code == 1 and not out.exists()
    (line,) = failed.lines
    assert line.startswith(f"nufilt: {path}: vision_model.encoder.layers.0.self_attn.")
    assert line.endswith(f".weight and {more} more: the solution is not finite ({kept})")
    assert [step["task"] for step in json.loads((tmp_path / "out.partial/nufilt.json").read_text())["steps"]] == [
        "alpha"
    ]
    other = nufilt(*command(models, out))
    assert other.code == 1 and f"remove {out}.partial" in other.err


def test_a_first_solution_that_is_not_finite_leaves_nothing(models, tmp_path, refused, command, monkeypatch):
    from nufilt_jax.engine import walk

    def fails(*_):
        raise SolveError(Problem("task", "the solution is not finite", "lower --learning-rate", build.Q0))

    monkeypatch.setattr(walk, "update", fails)
    (line,) = refused(*command(models, tmp_path / "out"))
    assert line.endswith("(lower --learning-rate)")


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (("merge", "--add", "x", "--base", "y"), "--base: does not go with --add (--add takes all but new tasks"),
        (("merge", "--model", "tiny", "--base", "x"), "--base: does not go with --model (a preset brings its own"),
        (("add", "x", "--add", "y"), "--add: is an option of merge, and not of add"),
    ],
)
def test_options_that_exclude_each_other(refused, argv, what):
    (line,) = refused(*argv, code=2)
    assert line.startswith(f"nufilt: {what}")


@pytest.mark.parametrize("out", ["/", "inside the base"])
def test_impossible_output_folder(models, refused, command, out):
    (line,) = refused(*command(models, models / "base" / "out" if out != "/" else out))
    assert LINE.match(line)


@pytest.mark.parametrize(
    "argv",
    [
        ("merge", "--nope"),
        ("merge", "surplus"),
        ("merge",),
        ("merge", "--base", "x"),
        ("merge", "--base", "x", "--task", "a=b"),
        ("merge", "--base", "x", "--task", "nopath", "--out", "o"),
        ("merge", "--base", "x", "--task", "=nopath", "--out", "o"),
        ("merge", "--base", "x", "--task", "noname=", "--out", "o"),
        ("merge", "--base", "x", "--base", "y", "--task", "a=b", "--out", "o"),
        ("merge", "--base", "x", "--task", "a=b", "--out", "o", "--filter-rank", "abc"),
        ("merge", "--base", "x", "--task", "a=b", "--out", "o", "--filter-rank", "1.5"),
        ("merge", "--base", "x", "--task", "a=b", "--out", "o", "--group", "8"),
        ("merge", "--base", "x", "--task", "a=b", "--out", "o", "--preset-table", "2"),
        ("merge", "--model", "tiny", "--base", "x"),
        ("merge", "--model", "tiny", "--task", "a=x"),
        ("merge", "--add", "x", "--out", "y"),
        ("merge", "--add", "x", "--base", "y"),
        ("add",),
        ("add", "x", "--add", "y"),
        ("plan",),
        ("unknown",),
    ],
    ids=" ".join,
)
def test_wrong_usage(refused, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    lines = refused(*argv, code=2)
    assert len(lines) == 1


def test_messages_are_never_wrapped(shared_models, tmp_path, refused, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "with [brackets] and :cat: " + "x" * 100
    (line,) = refused(*command(shared_models, tmp_path / "out", "--task", f"a={tmp_path / name}"))
    assert line.startswith(f"nufilt: {tmp_path / name}: there is no such folder")
