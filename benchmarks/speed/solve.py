"""Times one task's solve on layers of a model's true shapes, beside the published procedure in PyTorch.

Weights are synthetic (benchmarks/common/shapes.py) and the same for all contenders. Everything is on the device before
a clock starts. Set-up is compilation or, for torch-batched, the choice of a plan by trial and a first run. What the
other contenders are: benchmarks/speed/torch_reference.py. How work is counted: `nufilt_jax.engine.counts`.
Nothing else may run meanwhile, PyTorch's threads above all slow down many times over: the table says what other
processes took.
"""

import argparse
import dataclasses
import functools
import importlib.util
import statistics
import time
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import numpy as np

from benchmarks.common import measure, records, script, shapes
from benchmarks.common.measure import Machine
from benchmarks.common.records import Json
from benchmarks.common.shapes import Inputs, Shape
from benchmarks.speed.package_solve import DECOMPOSITION, Merge, Stage, stages, to_device
from nufilt_jax.config import Decomposition
from nufilt_jax.methods.nufilt import NufiltConfig

CONTENDERS = ("torch", "torch-released", "torch-batched")
OURS = "nufilt_jax"
PLAIN = "nufilt_jax, svd"


class Entry(NamedTuple):
    """What one contender did.

    Attributes:
      setup_seconds: of compilation, or of choosing a plan and the first run.
      stages: seconds of every run by stage, `total` among them.
      updates: by layer.
      notes: what it chose.
      neighbours: % of the machine's CPU time that other processes took meanwhile.
    """

    setup_seconds: float | None
    stages: dict[str, list[float]]
    updates: dict[str, np.ndarray]
    notes: Json
    neighbours: float | None

    def median(self, *names: str) -> float | None:
        """Median seconds of stages together; None if it has none of them."""
        parts = [statistics.median(self.stages[name]) for name in names if name in self.stages]
        return sum(parts) if parts else None


def main() -> None:
    """Parses the command line."""
    script.prepare_process()
    parser = _parser()
    options = parser.parse_args()
    device = _torch_device(parser) if options.against else ""
    config = NufiltConfig(decomposition=options.decomposition, steps=options.steps)
    document = run(options, config, device)
    records.finish(document, options.json or default_path(options))


def _parser() -> script.Parser:
    parser = script.Parser(__doc__, "solve_MODEL_PLATFORM.json")
    parser.add_argument("--model", choices=shapes.MODELS, required=True, metavar="MODEL", help=", ".join(shapes.MODELS))
    add_problem_options(parser)
    parser.add_argument(
        "--against", choices=CONTENDERS, nargs="+", default=[], metavar="CONTENDER", help=", ".join(CONTENDERS)
    )
    parser.add_argument(
        "--eager-repeats", type=script.at_least(1), default=1, help="timed runs of the eager contenders (default: 1)"
    )
    parser.add_argument("--steps", type=script.at_least(1), default=50, help="Adam steps (default: 50)")
    parser.add_argument("--tasks", type=script.at_least(2), metavar="T", help="also merge T tasks in memory")
    parser.add_argument("--skip-plain", action="store_true", help="do not compare with the package's own SVD route")
    return parser


def add_problem_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what is solved, but for the model."""
    parser.add_argument(
        "--layers", type=script.at_least(1), metavar="N", help="the first N blocks of each tower alone (default: all)"
    )
    parser.add_argument(
        "--alpha", type=float, default=shapes.ALPHA, help=f"decay of the spectra, k^-ALPHA (default: {shapes.ALPHA})"
    )
    parser.add_argument(
        "--decomposition",
        choices=get_args(Decomposition),
        default="auto",
        metavar="ROUTE",
        help=", ".join(get_args(Decomposition)) + " (default: auto)",
    )
    parser.add_argument("--repeats", type=script.at_least(1), default=5, help="timed runs (default: 5)")


def default_path(options: argparse.Namespace) -> Path:
    """Where results go if the command line does not say."""
    blocks = f"_{options.layers}-blocks" if options.layers else ""
    return records.RESULTS / f"solve_{options.model}{blocks}_{jax.default_backend()}.json"


def _torch_device(parser: argparse.ArgumentParser) -> str:
    """PyTorch's name of the device that JAX computes on; exits if PyTorch cannot."""
    if importlib.util.find_spec("torch") is None:
        parser.exit(1, f"{parser.prog}: --against: PyTorch is not installed (pip install torch)\n")
    import torch  # pyright: ignore[reportMissingImports]

    if jax.default_backend() == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        parser.exit(1, f"{parser.prog}: --against: JAX computes on a GPU, and this PyTorch has no CUDA\n")
    return "cuda"


def run(options: argparse.Namespace, config: NufiltConfig, device: str) -> Json:
    """Runs everything the options ask for; `device` is PyTorch's."""
    environment = measure.environment()
    layers = shapes.layer_shapes(options.model, options.layers)
    inputs = shapes.inputs(layers, config.adapter_rank, alpha=options.alpha)
    script.say(f"{options.model}: {len(layers)} layers")
    machine = measure.machine_rates()
    ours = Merge([inputs], config)
    script.say("compiled; timing the solve and its stages")
    neighbours = measure.Neighbours()
    times = ours.times(options.repeats)
    parts = stages(to_device(inputs), config, options.repeats)
    seconds = {"total": list(times.seconds), **{name: list(part.times.seconds) for name, part in parts.items()}}
    updates, certified = ours.results()
    notes = {"certified layers": certified}
    entries = {OURS: Entry(ours.compile_seconds, seconds, updates, notes, neighbours.percent())}
    del ours
    if not options.skip_plain:
        script.say("the package's SVD route")
        entries[PLAIN] = _plain(inputs, config)
    for name in options.against:
        script.say(name)
        entries[name] = _contender(name, inputs, config, device, options)
    tables = [
        _totals(entries, options),
        _stages(parts, machine),
        _ratios(entries),
        _agreement(entries),
        *([_merge(layers, inputs, config, options)] if options.tasks else []),
    ]
    return {
        "benchmark": "solve",
        "config": dataclasses.asdict(config),
        "dtype": "float32",
        "environment": environment,
        "layers": shapes.shape_counts(layers.values()),
        "machine": {"matmul_gflops": machine.matmul, "copy_gb_per_s": machine.copy},
        "notes": {name: entry.notes for name, entry in entries.items() if entry.notes},
        "seconds": {name: entry.stages for name, entry in entries.items()},
        "settings": script.settings(options),
        "tables": [one for one in tables if one["rows"]],
    }


def _plain(inputs: Inputs, config: NufiltConfig) -> Entry:
    """The package with full SVDs, timed once."""
    plain = Merge([inputs], dataclasses.replace(config, decomposition="svd"))
    neighbours = measure.Neighbours()
    seconds = {"total": list(plain.times(1).seconds)}
    return Entry(plain.compile_seconds, seconds, plain.results()[0], {}, neighbours.percent())


def _contender(name: str, inputs: Inputs, config: NufiltConfig, device: str, options: argparse.Namespace) -> Entry:
    from benchmarks.speed import torch_common, torch_reference

    start = time.perf_counter()
    batched = name == "torch-batched"
    warm_up = (inputs, config) if batched else (_first_of_each_shape(inputs), dataclasses.replace(config, steps=2))
    contender = torch_reference.contender(name, *warm_up, device)
    contender.run()
    setup = time.perf_counter() - start
    if not batched:
        contender = torch_reference.contender(name, inputs, config, device)
    neighbours = measure.Neighbours()
    outcome = contender.run()
    runs = [outcome.stages]
    for _ in range(1, options.repeats if batched else options.eager_repeats):
        outcome = contender.run()
        runs.append(outcome.stages)
    share = neighbours.percent()
    seconds = {stage: [one[stage] for one in runs] for stage in runs[0]}
    updates = torch_common.to_numpy(outcome.updates)
    return Entry(setup if batched else None, seconds, updates, contender.notes, share)


def _first_of_each_shape(inputs: Inputs) -> Inputs:
    firsts = {x.shape: name for name, x in reversed(inputs.task.items())}.values()
    return Inputs(*({name: part[name] for name in firsts} for part in inputs))


def _totals(entries: dict[str, Entry], options: argparse.Namespace) -> Json:
    columns = (
        *("contender", "set-up s", "runs", "min s", "median s"),
        *("decompose s", "reduce s", "adam s", "fuse s", "% CPU of others"),
    )
    rows = []
    for name, entry in entries.items():
        total = entry.stages["total"]
        decompose = entry.median("decompose", *DECOMPOSITION)
        others = [entry.median(stage) for stage in ("reduce", "adam", "fuse")]
        times = [min(total), statistics.median(total), decompose, *others]
        rows.append([name, entry.setup_seconds, len(total), *times, entry.neighbours])
    blocks = f", {options.layers} blocks of each tower" if options.layers else ""
    return records.table(f"One task's solve, {options.model}{blocks}", columns, rows)


def _stages(parts: dict[str, Stage], machine: Machine) -> Json:
    columns = (
        *("stage", "compile s", "min s", "median s", "GFLOP", "GFLOP/s", "% of matmul rate"),
        *("GB", "GB/s", "% of copy rate"),
    )
    rows = []
    for name, part in parts.items():
        seconds, flops, size = part.times.median, 1e-9 * part.work.flops, 1e-9 * part.work.bytes
        rates = [flops, flops / seconds, 100 * flops / seconds / machine.matmul]
        rates += [size, size / seconds, 100 * size / seconds / machine.copy]
        rows.append([name, part.compile_seconds, part.times.minimum, seconds, *rates])
    title = f"Stages apart; the machine: {machine.matmul:.0f} GFLOP/s, {machine.copy:.1f} GB/s"
    return records.table(title, columns, rows)


def _ratios(entries: dict[str, Entry]) -> Json:
    ours = entries[OURS]

    def ratio(entry: Entry, theirs: tuple[str, ...], mine: tuple[str, ...]) -> float | None:
        a, b = entry.median(*theirs), ours.median(*mine)
        return None if a is None or b is None else a / b

    rows = [
        [
            name,
            ratio(entry, ("total",), ("total",)),
            ratio(entry, ("decompose",), DECOMPOSITION),
            ratio(entry, ("adam",), ("adam",)),
            ratio(entry, ("reduce", "adam"), ("reduce", "adam")),
        ]
        for name, entry in entries.items()
        if name != OURS
    ]
    return records.table("Times ours, by medians", ("contender", "total", "decompose", "adam", "reduce + adam"), rows)


def _agreement(entries: dict[str, Entry]) -> Json:
    rows = []
    for name, entry in entries.items():
        if name != OURS:
            apart = [difference(x, entry.updates[layer]) for layer, x in entries[OURS].updates.items()]
            rows.append([name, max(apart), statistics.median(apart)])
    return records.table("Relative difference of our updates", ("contender", "max", "median"), rows)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative Frobenius norm of the difference."""
    return float(np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs.astype(np.float64)))


def _merge(layers: dict[str, Shape], inputs: Inputs, config: NufiltConfig, options: argparse.Namespace) -> Json:
    script.say(f"a merge of {options.tasks} tasks")
    merge = Merge(merge_inputs(layers, inputs, config, options), config)
    times = merge.times(options.repeats)
    row = [options.tasks, merge.compile_seconds, times.minimum, times.median, times.median / (options.tasks - 1)]
    columns = ("tasks", "compile s", "min s", "median s", "median s per solve")
    return records.table("Merge in memory", columns, [row])


def merge_inputs(
    layers: dict[str, Shape], first: Inputs, config: NufiltConfig, options: argparse.Namespace
) -> list[Inputs]:
    """The solves of a merge of `options.tasks` tasks; all have the first one's D, which the merge moves on from."""
    later = functools.partial(shapes.inputs, layers, config.adapter_rank, alpha=options.alpha, merged=first.merged)
    return [first, *(later(task=i) for i in range(2, options.tasks))]


if __name__ == "__main__":
    main()
