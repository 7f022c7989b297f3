"""Measures the largest resident memory of the whole command, `python -m nufilt_jax.merge`, as a multiple of the model.

The models are synthetic, of the shapes of a Llama and in bfloat16, and are written into a scratch folder first. What
is counted is everything: Python and JAX, D, task vectors, what is being read and written, and the mapped pages of
files. A multiple is of the bytes of the model in float32, the type that a merge computes in.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from benchmarks.common import measure, records, script
from nufilt_jax.checkpoints.safetensors_files import Piece, write_file

METHODS = ("nufilt", "task_arithmetic", "weight_average")
LIMITS = {"nufilt": 4.0}  # multiples wanted; 3 for methods that keep D alone
STEPS = 3  # of Adam: they change the time, and no array
TITLE = "largest resident memory of the whole command"


class Llama(NamedTuple):
    """Size of a language model."""

    width: int = 1024
    inner: int = 2816
    blocks: int = 8
    vocabulary: int = 8192

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name, as transformers names them."""
        width, inner = self.width, self.inner
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, width)}
        for block in range(self.blocks):
            stem = f"model.layers.{block}."
            found |= {f"{stem}self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
            found |= {f"{stem}mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
            found |= {f"{stem}mlp.down_proj.weight": (width, inner), f"{stem}input_layernorm.weight": (width,)}
        return found | {"model.norm.weight": (width,)}

    @property
    def n_bytes(self) -> int:
        """Of the model in float32."""
        return 4 * sum(int(np.prod(shape)) for shape in self.shapes().values())


def write_model(folder: Path, model: Llama, task: int | None) -> None:
    """A model folder: the base, or the base plus noise. One tensor at a time is in memory."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    pieces = [Piece(name, "BF16", shape, _content(name, shape, task)) for name, shape in model.shapes().items()]
    write_file(folder / "model.safetensors", pieces, {"format": "pt"})


def _content(name: str, shape: tuple[int, ...], task: int | None) -> Iterator[memoryview]:
    tensor = 0.02 * np.random.default_rng(list(name.encode())).standard_normal(shape, np.float32)
    if task is not None:
        tensor += 1e-3 * np.random.default_rng([task, *name.encode()]).standard_normal(shape, np.float32)
    yield tensor.astype(ml_dtypes.bfloat16).reshape(-1).view(np.uint8).data


def peak(folder: Path, method: str, n_tasks: int) -> int:
    """Largest resident memory in bytes of one merge of the folder's models, which is removed again."""
    out = folder / "out"
    tasks = [part for index in range(n_tasks) for part in ("--task", f"task{index}={folder / f'task{index}'}")]
    command = [sys.executable, "-m", "nufilt_jax.merge", "--base", folder / "base", *tasks, "--out", out, "--quiet"]
    command += ["--method", method, *(("--steps", STEPS) if method == "nufilt" else ())]
    environment = os.environ | {"NUFILT_CACHE": str(folder / "cache")}
    with (folder / "problems").open("w+") as problems:
        process = subprocess.Popen([str(part) for part in command], stderr=problems, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            problems.seek(0)
            raise SystemExit(f"{method} ended with status {process.returncode}: {problems.read()}")
    shutil.rmtree(out)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def document(peaks: dict[tuple[str, int], int], model: Llama) -> records.Json:
    """The results: a row per method and number of tasks."""
    rows = [
        [method, n_tasks, found / 1e9, found / model.n_bytes, LIMITS.get(method, 3.0)]
        for (method, n_tasks), found in peaks.items()
    ]
    columns = ("method", "tasks", "peak GB", "times the model in float32", "wanted at most")
    about = {"model": model._asdict(), "float32_bytes": model.n_bytes, "dtype": "bfloat16"}
    return {"environment": measure.environment(), "about": about, "tables": [records.table(TITLE, columns, rows)]}


def main() -> None:
    """Parses the command line, makes the models, runs the commands."""
    parser = script.Parser(__doc__, "memory.json")
    positive = script.at_least(1)
    parser.add_argument("--methods", nargs="+", default=METHODS, help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--tasks", type=positive, nargs="+", default=(2, 3), help="numbers of tasks (default: 2 3)")
    for name, value in Llama()._asdict().items():
        parser.add_argument(f"--{name}", type=positive, default=value, help=f"of the model (default: {value})")
    parser.add_argument("--folder", type=Path, help="where to make the models, and keep them (default: nowhere)")
    arguments = parser.parse_args()
    model = Llama(*(getattr(arguments, name) for name in Llama._fields))
    with tempfile.TemporaryDirectory() as passing:
        folder = arguments.folder or Path(passing)
        for task in (None, *range(max(arguments.tasks))):
            target = folder / ("base" if task is None else f"task{task}")
            if not target.exists():
                script.say(f"writing {target.name}")
                write_model(target, model, task)
        peaks = {}
        for method in arguments.methods:
            for n_tasks in arguments.tasks:
                script.say(f"{method}, {n_tasks} tasks")
                peaks[method, n_tasks] = peak(folder, method, n_tasks)
    records.finish(document(peaks, model), arguments.json or records.RESULTS / "memory.json")


if __name__ == "__main__":
    main()
