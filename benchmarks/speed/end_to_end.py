"""Times the whole command, `python -m nufilt_jax.merge`, on models of ViT-B/32's true size, and measures its memory.

The models are synthetic (random weights, task vectors with a power-law spectrum) and are written first, so that their
files are in the page cache unless --evict is given. The command runs in a fresh process and says itself where its time
goes; one short run before fills its compile cache.
"""

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import measure, records, script, shapes
from nufilt_jax.checkpoints.safetensors_files import Piece, write_file

TASKS = (8, 14, 20)
FEWEST = 3  # tasks of the run that fills the compile cache: the third compiles nothing
GIB = 2**30
SECONDS, HIDDEN, GROWTH = "seconds of the whole command", "seconds in the background", "growth with the number of tasks"


class Tower(NamedTuple):
    """Size of a CLIP vision tower."""

    width: int = 768
    blocks: int = 12
    patch: int = 32

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name, as transformers 4 names them."""
        width, inner, embeddings = self.width, 4 * self.width, "vision_model.embeddings."
        found: dict[str, tuple[int, ...]] = {
            embeddings + "class_embedding": (width,),
            embeddings + "patch_embedding.weight": (width, 3, self.patch, self.patch),
            embeddings + "position_embedding.weight": ((224 // self.patch) ** 2 + 1, width),
        }
        linear = {f"self_attn.{part}_proj": (width, width) for part in "qkv"} | {
            "self_attn.out_proj": (width, width),
            "mlp.fc1": (inner, width),
            "mlp.fc2": (width, inner),
        }
        norms = [f"vision_model.{name}" for name in ("pre_layrnorm", "post_layernorm")]
        for block in range(self.blocks):
            prefix = f"vision_model.encoder.layers.{block}."
            found |= {f"{prefix}{name}.weight": shape for name, shape in linear.items()}
            found |= {f"{prefix}{name}.bias": shape[:1] for name, shape in linear.items()}
            norms += [f"{prefix}layer_norm{number}" for number in (1, 2)]
        return found | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}

    @property
    def n_bytes(self) -> int:
        """Of the model in float32."""
        return 4 * sum(int(np.prod(shape)) for shape in self.shapes().values())

    def config(self) -> dict[str, Any]:
        """Content of `config.json`."""
        return {
            "model_type": "clip_vision_model",
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": max(1, self.width // 64),
            "patch_size": self.patch,
            "image_size": 224,
            "torch_dtype": "float32",
        }


def write_model(folder: Path, tower: Tower, task: int | None) -> None:
    """A model folder: the base, or the base plus a task vector. One tensor at a time is in memory."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(tower.config()))
    pieces = [Piece(name, "F32", shape, _content(name, shape, task)) for name, shape in tower.shapes().items()]
    write_file(folder / "model.safetensors", pieces, {"format": "pt"})


def _content(name: str, shape: tuple[int, ...], task: int | None) -> Iterator[memoryview]:
    tensor = pretrained(name, shape)
    if task is not None:
        tensor += task_vector(name, shape, task)
    yield tensor.reshape(-1).view(np.uint8).data


def pretrained(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the base, float32."""
    return 0.02 * np.random.default_rng(list(name.encode())).standard_normal(shape, np.float32)


def task_vector(name: str, shape: tuple[int, ...], task: int) -> np.ndarray:
    """What a task adds to it, float32."""
    rng = np.random.default_rng([task, *name.encode()])
    return _moved(shape, rng) if len(shape) == 2 else 1e-4 * rng.standard_normal(shape, np.float32)


@functools.cache
def _spectrum(shape: tuple[int, int]) -> np.ndarray:
    return shapes.task_vector("any", shape, task=0)


def _moved(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A task vector: one matrix per shape, its rows and columns in an order and with signs of their own."""
    order = [rng.permutation(size) for size in shape]
    signs = [rng.choice(np.array([-1, 1], np.float32), size) for size in shape]
    return _spectrum((shape[0], shape[1]))[np.ix_(*order)] * signs[0][:, None] * signs[1]


class Run(NamedTuple):
    """One command, from the start of its process to the end: its wall time, largest resident memory, and document."""

    wall: float
    peak: int
    document: dict[str, Any]


def run_command(folder: Path, n_tasks: int, *, evict: bool = False) -> Run:
    """Merges the first tasks of a folder of models; removes the merged model again.

    Args:
      folder: with models `base` and `task00`, `task01` ...; the compile cache is in it too.
      n_tasks: how many.
      evict: drop the models' files from the page cache before.
    """
    models = [folder / "base", *(folder / f"task{index:02}" for index in range(n_tasks))]
    if evict:
        _evict(models)
    tasks = [part for model in models[1:] for part in ("--task", f"{model.name}={model}")]
    out, told, problems = (folder / name for name in ("out", "out.json", "out.log"))
    command = [sys.executable, "-m", "nufilt_jax.merge", "--base", models[0], *tasks, "--out", out, "--json"]
    environment = os.environ | {"NUFILT_CACHE": str(folder / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    with told.open("w") as stdout, problems.open("w") as stderr:
        start = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=stdout, stderr=stderr, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the command ended with status {process.returncode}: {problems.read_text()}")
    shutil.rmtree(out)
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(wall, usage.ru_maxrss * unit, json.loads(told.read_text()))


def _evict(models: list[Path]) -> None:
    for path in (path for model in models for path in model.iterdir()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def split(run: Run) -> dict[str, float]:
    """Seconds by what the command waited for; they add up to the wall time."""
    document, steps = run.document, run.document["steps"]
    timings = document["timings"]
    parts = {
        "plan": timings["plan"],
        "check files": timings["inspect"],
        "wait for a task": sum(step["timings"]["wait"] for step in steps),
        "compile": document["compiled"]["seconds"],
        "solve": sum(step["timings"]["solve"] for step in steps) - document["compiled"]["seconds"],
        "write state": timings["write_state"],
        "write model": timings["write_model"],
    }
    return {"start, end": run.wall - sum(parts.values()), **parts}


def document(runs: dict[int, Run], tower: Tower, how: str) -> records.Json:
    """The results: a row per number of tasks, and how the wall time grows with it."""
    limit = 3 * tower.n_bytes + GIB
    rows, hidden = [], []
    for n_tasks, run in runs.items():
        parts, steps, compiled = split(run), run.document["steps"], run.document["compiled"]
        rest = 100 * (1 - parts["solve"] / run.wall)
        rows.append([n_tasks, run.wall, *parts.values(), rest, run.peak / GIB, limit / GIB])
        read, put = (sum(step["timings"][part] for step in steps) for part in ("read", "put"))
        missed = compiled["programs"] - compiled["from_cache"]
        hidden.append([n_tasks, read, put, compiled["programs"], missed])
    columns = ("tasks", "wall", *split(next(iter(runs.values()))), "not solving, %", "peak GiB", "limit GiB")
    tables = [
        records.table(SECONDS, columns, rows),
        records.table(HIDDEN, ("tasks", "read", "put", "programs", "compiled anew"), hidden),
    ]
    if len(runs) > 2:
        tables.append(_growth({n_tasks: run.wall for n_tasks, run in runs.items()}))
    about = {"tower": tower._asdict(), "model_bytes": tower.n_bytes, "how": how}
    return {"environment": measure.environment(), "about": about, "tables": tables}


def _growth(wall: dict[int, float]) -> records.Json:
    """A straight line through the wall times, and how far they are off it."""
    slope, start = (float(x) for x in np.polyfit(list(wall), list(wall.values()), 1))
    rows = [[n, seconds, start + slope * n, 100 * (seconds / (start + slope * n) - 1)] for n, seconds in wall.items()]
    rows.append(["per task", slope, None, None])
    return records.table(GROWTH, ("tasks", "wall", "line", "off it, %"), rows)


def main() -> None:
    """Parses the command line, makes the models, runs the command."""
    parser = script.Parser(__doc__, "end_to_end.json")
    positive = script.at_least(1)
    parser.add_argument("--tasks", type=positive, nargs="+", default=TASKS, help="numbers of tasks (default: 8 14 20)")
    parser.add_argument("--folder", type=Path, help="where to make the models, and keep them (default: nowhere)")
    parser.add_argument("--blocks", type=positive, default=Tower().blocks, help="of the tower (default: 12)")
    parser.add_argument("--width", type=positive, default=Tower().width, help="of the tower (default: 768)")
    parser.add_argument("--cold", action="store_true", help="empty the compile cache before each run")
    parser.add_argument("--evict", action="store_true", help="read from the disk, not from the page cache")
    arguments = parser.parse_args()
    tower = Tower(arguments.width, arguments.blocks)
    with tempfile.TemporaryDirectory() as passing:
        folder = arguments.folder or Path(passing)
        for task in itertools.chain([None], range(max(*arguments.tasks, FEWEST))):
            model = folder / ("base" if task is None else f"task{task:02}")
            if not model.exists():
                script.say(f"writing {model.name}")
                write_model(model, tower, task)
        if not arguments.cold:
            script.say("filling the compile cache")
            run_command(folder, FEWEST)
        runs = {}
        for n_tasks in arguments.tasks:
            if arguments.cold:
                shutil.rmtree(folder / "cache", ignore_errors=True)
            script.say(f"merging {n_tasks} tasks")
            runs[n_tasks] = run_command(folder, n_tasks, evict=arguments.evict)
    how = f"compile cache {'cold' if arguments.cold else 'warm'}, files {'cold' if arguments.evict else 'warm'}"
    records.finish(document(runs, tower, how), arguments.json or records.RESULTS / "end_to_end.json")


if __name__ == "__main__":
    main()
