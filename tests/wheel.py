"""Tries an installed wheel from outside the checkout: make package runs this with the wheel's own Python, from /."""

import contextlib
import importlib.resources
import io
import pathlib
import sys
import tempfile

import nufilt_jax
from nufilt_jax import cli

HERE = pathlib.Path(__file__).resolve().parents[1]


def told(*argv: str) -> str:
    """What a command writes on stdout."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        status = cli.main(list(argv))
    if status:
        sys.exit(f"nufilt {' '.join(argv)}: exit status {status}")
    return stream.getvalue()


def main() -> None:
    """Tries it; ends with a line that says what is wrong."""
    place = pathlib.Path(nufilt_jax.__file__).resolve()
    if HERE in place.parents and "site-packages" not in place.parts:
        sys.exit(f"{place}: this is the checkout, not the wheel")
    if not (importlib.resources.files("nufilt_jax") / "py.typed").is_file():
        sys.exit("the wheel lacks py.typed")
    if told("--version").strip() != nufilt_jax.__version__:
        sys.exit("the versions differ")
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        told("merge", "--model", "tiny", "--method", "sum", "--limit", "20", "--out", out)
        told("init", f"{folder}/merge.toml")
        if "nufilt" not in told("merge", "--method", "help"):
            sys.exit("the table of methods is empty")
        if not (pathlib.Path(out) / "model.safetensors").is_file():
            sys.exit("no model was written")
    sys.stdout.write(f"the wheel of {nufilt_jax.__version__} merges, from {place.parent}\n")


if __name__ == "__main__":
    main()
