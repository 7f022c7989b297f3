"""Adapters merged in their factors and materialised: seconds per task and peak memory, at the shapes of a 7B model.

Synthetic adapters of one rank on all linear layers of the blocks. In factors it is the command itself, from PEFT
folders to a PEFT folder, in a process of its own; the base is a file of zeros with holes, of which nothing is read but
the header. Materialised are the same tasks on the layers of few blocks, in another process: D and τ are dense, of the
same numbers. Ratios are of seconds per task and block. PyTorch's ways (`speed.torch_lora`) run on a few layers where
torch and peft are installed; seconds are then per layer.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

from benchmarks.common import commands, measure, records, script
from nufilt_jax import methods
from nufilt_jax.checkpoints import open_checkpoint, open_task
from nufilt_jax.engine.timing import CompileLog
from nufilt_jax.methods.nufilt import NufiltConfig
from nufilt_jax.methods.stacked import task_vector

COLUMNS = ("solver", "how", "blocks", "compile s", "min s / task", "median s / task", "whole run s", "peak GiB")
TORCH_COLUMNS = ("how", "layers", "s / layer", "peak GiB")
SOLVERS = ("closed_form", "adam")
WARM_UP = 2  # tasks that are not timed: the first is taken as it is, the second is the first that is solved
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
UP, DOWN = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"


class Model(NamedTuple):
    """A decoder of LLaMA's form.

    Attributes:
      blocks: how many.
      width: of the residual stream.
      hidden: of the feed-forward layers.
    """

    blocks: int = 32
    width: int = 4096
    hidden: int = 11008

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of all linear layers, by module."""
        found = {}
        for block in range(self.blocks):
            stem = f"model.layers.{block}."
            found |= {stem + module: (self.width, self.width) for module in MODULES}
            found |= {stem + module: (self.hidden, self.width) for module in UP}
            found[stem + DOWN] = (self.width, self.hidden)
        return found


def write_base(folder: Path, model: Model) -> None:
    """A model of zeros in bfloat16; a file with holes takes no room."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": model.width}))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for module, (m, n) in model.shapes().items():
        table[f"{module}.weight"] = {"dtype": "BF16", "shape": [m, n], "data_offsets": [at, at + 2 * m * n]}
        at += 2 * m * n
    text = json.dumps(table).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def write_adapter(folder: Path, model: Model, rank: int, seed: int) -> None:
    """Factors as a training leaves them: of falling singular values."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    fall = np.arange(1, rank + 1, dtype=np.float32) ** -0.5
    tensors = {}
    for module, (m, n) in model.shapes().items():
        a = rng.standard_normal((rank, n), np.float32) / np.float32(n**0.5)
        b = 0.1 * fall * rng.standard_normal((m, rank), np.float32) / np.float32(m**0.5)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_models(folder: Path, model: Model, rank: int, tasks: int) -> None:
    """A base and its adapters."""
    write_base(folder / "base", model)
    for task in range(tasks):
        write_adapter(folder / f"task{task}", model, rank, task)


def in_factors(folder: Path, tasks: int, solver: str, cap: str, out: Path, *, output: str = "adapter") -> records.Json:
    """The command under a memory cap, in a process of its own; compiling is told apart."""
    names = [f"task{task}" for task in range(tasks)]
    given = [part for name in names for part in ("--task", f"{name}={folder / name}")]
    command = [*commands.MERGE, "--base", folder / "base", *given, "--out", out]
    [version] = commands.versions(None)
    options = ["--output", output, "--solver", solver, "--max-memory", cap, "--json"]
    ran = commands.run([*command, *options], version, folder / "cache")
    timings = [step["timings"] for step in ran.document["steps"][WARM_UP:]]
    return {
        "seconds": [one["solve"] - one.get("compile", 0.0) for one in timings],
        "compile": commands.compile_seconds(ran),
        "peak": ran.peak,
        "wall": ran.wall,
        "timings": ran.document["timings"],
    }


def materialised(folder: Path, tasks: int, solver: str) -> records.Json:
    """Dense D and τ, in this process: seconds of each task but the first ones, without compiling."""
    base = open_checkpoint(str(folder / "base"), role="base")
    config = NufiltConfig(solver=solver)  # pyright: ignore[reportArgumentType]
    merger = methods.get("nufilt", config)
    state = merger.init(base.read())
    seconds = []
    for task in range(tasks):
        opened = open_task(str(folder / f"task{task}"), base)
        vector, log = task_vector(base.read(), opened.unread(base.tensors), state.delta.names), CompileLog()
        with log.listening():
            start = time.perf_counter()
            state = merger.update(state, vector, donate=True)
            jax.block_until_ready(state.delta)
            seconds.append(time.perf_counter() - start)
        seconds[-1] -= log.as_dict()["seconds"]
    return {"seconds": seconds[WARM_UP:]}


def _alone(folder: Path, tasks: int, solver: str) -> records.Json:
    """`materialised`, in a process of its own."""
    ran = commands.run_module("benchmarks.speed.lora", "--alone", given=[str(folder), tasks, solver])
    return {**ran.document, "peak": ran.peak}


def run(
    model: Model, few: int, rank: int, tasks: int, cap: str, folder: Path
) -> tuple[list[list[Any]], list[records.Json]]:
    """The table's rows, and how many times faster factors are, by solver."""
    write_models(folder / "whole", model, rank, tasks)
    write_models(folder / "few", model._replace(blocks=few), rank, tasks)
    rows, ratios = [], []
    for solver in SOLVERS:
        script.say(f"{solver} in factors")
        found = in_factors(folder / "whole", tasks, solver, cap, folder / f"out-{solver}")
        rows.append(_row(solver, "in factors, the command", model.blocks, found))
        script.say(f"{solver} materialised")
        dense = _alone(folder / "few", tasks, solver)
        rows.append(_row(solver, "materialised", few, dense))
        ours, theirs = statistics.median(found["seconds"]), statistics.median(dense["seconds"])
        ratios.append({"solver": solver, "times faster": (theirs / few) / (ours / model.blocks)})
        ratios[-1] |= {"timings": found["timings"]}
    return rows, ratios


def with_torch(folder: Path, model: Model, n_layers: int, rank: int, tasks: int) -> records.Json:
    """PyTorch's ways on the first layers of the model, in a process of their own."""
    modules = list(model.shapes())[:n_layers]
    ran = commands.run_module("benchmarks.speed.torch_lora", given=[str(folder), modules, rank, tasks])
    return {**ran.document, "peak": ran.peak}


def torch_rows(found: records.Json, n_layers: int) -> list[list[Any]]:
    """Seconds of a layer: peft's of all tasks at once, the published procedure's of one task."""
    ways = {"peft": "peft's add_weighted_adapter, svd, all tasks", "published": "published, eager, one task"}
    return [[way, n_layers, found[key] / n_layers, found["peak"] / measure.GIB] for key, way in ways.items()]


def _row(solver: str, how: str, blocks: int, found: records.Json) -> list[Any]:
    seconds = found["seconds"]
    times = min(seconds), statistics.median(seconds)
    return [solver, how, blocks, found.get("compile"), *times, found.get("wall"), found["peak"] / measure.GIB]


def main() -> None:
    """Parses the command line."""
    parser = script.Parser(__doc__, "lora_PLATFORM.json")
    parser.add_argument("--blocks", type=script.at_least(1), default=32, help="in factors (default: 32)")
    parser.add_argument("--few", type=script.at_least(1), default=1, help="blocks materialised (default: 1)")
    parser.add_argument("--width", type=script.at_least(1), default=4096, help="of the model (default: 4096)")
    parser.add_argument("--hidden", type=script.at_least(1), default=11008, help="feed-forward (default: 11008)")
    parser.add_argument("--rank", type=script.at_least(1), default=16, help="of the adapters (default: 16)")
    parser.add_argument("--tasks", type=script.at_least(3), default=8, help="adapters; two are to warm up (default: 8)")
    parser.add_argument("--max-memory", default="2GB", metavar="SIZE", help="of the command (default: 2GB)")
    parser.add_argument("--torch-layers", type=int, default=0, help="for PyTorch's ways (default: 0, none)")
    parser.add_argument("--alone", metavar="JSON", help="materialise in this process; the script calls itself so")
    options = parser.parse_args()
    if options.alone:
        folder, tasks, solver = json.loads(options.alone)
        sys.stdout.write(json.dumps(materialised(Path(folder), tasks, solver)))
        return
    environment, rates = measure.environment(), measure.machine_rates()
    model = Model(options.blocks, options.width, options.hidden)
    with tempfile.TemporaryDirectory(prefix="nufilt-lora-") as folder:
        rows, ratios = run(model, options.few, options.rank, options.tasks, options.max_memory, Path(folder))
        few, n_layers = model._replace(blocks=options.few), options.torch_layers
        args = (Path(folder) / "few", few, n_layers, options.rank, options.tasks)
        theirs = with_torch(*args) if n_layers else None
    title = f"{options.tasks} adapters of rank {options.rank}, layers {model.width} and {model.hidden} wide"
    document = {
        "benchmark": "lora",
        "dtype": "float32",
        "environment": environment,
        "machine": rates._asdict(),
        "settings": script.settings(options) | {"alone": None},
        "ratios": ratios,
        "tables": [records.table(title, COLUMNS, rows)],
    }
    if theirs is not None:
        layers = torch_rows(theirs, n_layers)
        document["torch"] = theirs["versions"]
        document["tables"].append(records.table("PyTorch on single layers", TORCH_COLUMNS, layers))
    records.finish(document, options.json or records.RESULTS / f"lora_{environment['platform']}.json")


if __name__ == "__main__":
    main()
