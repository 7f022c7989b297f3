"""What the command line answers without starting JAX, and under all its names."""

import sys
from pathlib import Path

import pytest

from nufilt_jax import __version__

PROBE = """
import sys
from nufilt_jax.cli import main
code = main(sys.argv[2:], prog=sys.argv[1])
heavy = {"jax", "numpy", "flax", "orbax", "huggingface_hub", "safetensors"} & set(sys.modules)
sys.exit(f"imports {heavy}" if heavy else code)
"""


@pytest.mark.parametrize(
    ("prog", "argv", "shown"),
    [
        ("nufilt", ["--help"], ["merge", "add", "plan", "evaluate", "analyze"]),
        ("nufilt", ["--version"], [__version__]),
        ("nufilt", ["merge", "--help"], ["--base", "--method-args", "--filter-rank"]),
        ("nufilt", ["add", "--help"], ["FOLDER", "--task"]),
        ("nufilt", ["plan", "--help"], ["--base"]),
        ("nufilt", ["evaluate", "--help"], ["FOLDER", "--task", "--tasks-file", "--heads-from", "--limit"]),
        ("nufilt", ["analyze", "--help"], ["FOLDER", "--images", "--tasks-file"]),
        ("python -m nufilt_jax.merge", ["--help"], ["python -m nufilt_jax.merge", "--base", "--other-params"]),
        ("python -m nufilt_jax.merge", ["--version"], [__version__]),
    ],
    ids=lambda part: part if isinstance(part, str) else " ".join(part),
)
def test_help_is_quick(finish, prog, argv, shown):
    result = finish("-c", PROBE, prog, *argv)
    assert (result.code, result.err) == (0, ""), result.err
    assert all(text in result.out for text in shown)


def test_wrong_usage_is_quick(finish):
    assert finish("-c", PROBE, "nufilt", "merge", "--nope").code == 2


def test_module_and_console_script(finish):
    module = finish("-m", "nufilt_jax.merge", "--help")
    assert module.code == 0 and "--base" in module.out
    assert finish("-m", "nufilt_jax", "--version").out.strip() == __version__
    script = Path(sys.executable).with_name("nufilt")
    if script.exists():
        assert "nufilt_jax.cli" in script.read_text()


def test_both_front_doors_are_one(shared_models, tmp_path, nufilt, command):
    _, *argv = command(shared_models, tmp_path / "out", "--method", "sum", "--json")
    from nufilt_jax.cli import main

    assert main(argv, prog="python -m nufilt_jax.merge") == 0
    result = nufilt("merge", *argv)
    assert all(step["resumed"] for step in result.json["steps"])
    task = f"delta={shared_models / 'delta'}"
    assert main(["--add", str(tmp_path / "out"), "--task", task], prog="python -m nufilt_jax.merge") == 0
    assert len(nufilt("add", tmp_path / "out", "--task", task, "--json").json["tasks"]) == 4
