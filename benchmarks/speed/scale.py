"""Measures merges of models with a 7 B Llama's matrices, at as many blocks as the disk holds, and what 32 would take.

The models are synthetic: random weights in bfloat16, task vectors with a power-law spectrum. The whole command runs in
a fresh process and says itself what it spent on compiling, which is left out where sizes are compared; there it may run
several times, of which the fastest counts, for the machine's own speed varies. Stages are timed on the matrices of one
block, in this process, and the eager published procedure, which needs torch, on one matrix of
each shape; of its Adam steps, all of which do the same work, a few may be timed and the rest counted in proportion.
Simulated devices share the cores: what they take longer than one is what dividing the layers costs.
"""

import argparse
import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import commands, measure, models, records, script, shapes
from benchmarks.common.commands import Run, Version
from benchmarks.common.shapes import Inputs
from benchmarks.speed.end_to_end import split
from nufilt_jax.engine.memory import parse_size
from nufilt_jax.methods.nufilt import NufiltConfig

BLOCKS, CAPS, DEVICES, WHOLE = (2, 4, 8), ("4GB", "8GB", "16GB"), (1, 2, 4), 32
SECONDS, MEMORY, PER_BLOCK = "seconds of the whole command", "memory", "seconds per block and task"
LINEAR, EAGER, SPREAD = (
    "growth with blocks and tasks, without compiling",
    "one task, a matrix of each shape",
    "simulated devices",
)
ESTIMATE = "estimate beside the run"
READING, WRITING = ("check files", "wait for a task"), ("write state", "write model")
_SIMULATE = "--xla_force_host_platform_device_count={}"


class Case(NamedTuple):
    """One merge: of so many blocks and tasks, under a cap as `--max-memory` takes it."""

    blocks: int
    tasks: int
    cap: str

    def cells(self) -> list[int | float]:
        """The first of a row."""
        return [self.blocks, self.tasks, parse_size(self.cap) / 1e9]


CASE = ("blocks", "tasks", "cap GB")


class Found(NamedTuple):
    """A case that ran: what had been planned, what it did, and what it did each time, the fastest first."""

    plan: records.Json
    runs: list[Run]


def cases(blocks: Sequence[int], n_tasks: int, caps: Sequence[str]) -> list[Case]:
    """All sizes under the middle cap, and the middle size under every cap."""
    cap, size = _middle(caps), _middle(blocks)
    found = [Case(n, n_tasks, cap) for n in blocks] + [Case(size, n_tasks, one) for one in caps]
    return sorted(set(found), key=lambda case: (case.blocks, parse_size(case.cap)))


def _middle(listed: Sequence[Any]) -> Any:
    return listed[len(listed) // 2]


def measured(case: Case, repeat: int, folder: Path, version: Version) -> Found:
    """Runs one case so many times, each with an empty compile cache."""
    options, runs = [*commands.sources(folder, case.tasks), "--max-memory", case.cap], list[Run]()
    plan = commands.plan(folder, options, version)
    for _ in range(repeat):
        commands.empty_compile_cache(folder, version)
        runs.append(commands.merge(folder, options, version))
    return Found(plan, sorted(runs, key=_worked))


def _worked(run: Run) -> float:
    """Seconds without compiling."""
    return run.wall - commands.compile_seconds(run)


def spread_over(n_devices: int, folder: Path, version: Version) -> Run:
    """Merges two tasks on so many simulated devices."""
    options = [*commands.sources(folder, 2), "--devices", str(n_devices)]
    return commands.merge(folder, options, version, {"XLA_FLAGS": _SIMULATE.format(n_devices)})


def block_inputs(model: models.Llama, config: NufiltConfig) -> Inputs:
    """D, τ and A's starts of the matrices of one block."""
    own = {name: (s[0], s[1]) for name, s in model.shapes().items() if ".layers.0." in name and len(s) == 2}
    return shapes.inputs(own, config.adapter_rank)


def block_stages(inputs: Inputs, config: NufiltConfig) -> dict[str, float]:
    """Seconds of the package's stages on some matrices, each a program of its own."""
    from benchmarks.speed import package_solve

    found = package_solve.stages(package_solve.to_device(inputs), config, 1, count=False)
    seconds = {name: stage.times.minimum for name, stage in found.items()}
    decompose = sum(seconds[name] for name in package_solve.DECOMPOSITION)
    return {"decompose": decompose, "adam": seconds["adam"], "fuse": seconds["reduce"] + seconds["fuse"]}


def one_of_each(inputs: Inputs) -> Inputs:
    """The first matrix of every shape."""
    names = {x.shape: name for name, x in reversed(inputs.task.items())}.values()
    return Inputs(*({name: part[name] for name in names} for part in inputs))


def solve_total(inputs: Inputs, config: NufiltConfig) -> float:
    """Seconds of the package's solve of some matrices."""
    from benchmarks.speed import package_solve

    return package_solve.Merge([inputs], config).times(1).minimum


def eager_seconds(inputs: Inputs, config: NufiltConfig, steps: int) -> dict[str, float]:
    """Seconds of the published procedure as printed, its Adam steps in proportion to the `steps` that are run."""
    from benchmarks.speed import torch_reference

    few = dataclasses.replace(config, steps=steps)
    seconds = torch_reference.contender("torch", inputs, few, "cpu").run().stages
    seconds["adam"] *= config.steps / steps
    return seconds | {"total": sum(seconds[part] for part in ("decompose", "adam", "fuse"))}


def line(points: Mapping[int, float], at: int) -> tuple[float, float]:
    """The value at `at` of the straight line through some points, and how far in per cent the worst of them is off it.

    Of fewer than three points, which tell nothing of a line, the last one in proportion.

    >>> [round(x, 6) for x in line({2: 30.0, 4: 50.0, 8: 90.0}, 32)]
    [330.0, 0.0]
    >>> line({1: 40.0, 2: 50.0}, 32)[0]
    800.0
    """
    sizes, values = np.array(list(points)), np.array(list(points.values()))
    if len(points) < 3:
        return float(values[-1] * at / sizes[-1]), 0.0
    slope, start = np.polyfit(sizes, values, 1)
    return float(start + slope * at), float(np.max(100 * np.abs(values / (start + slope * sizes) - 1)))


def tables(
    found: Mapping[Case, Found], refused: Sequence[Case], stages: Mapping[str, float], main_cap: str, whole: int
) -> list[records.Json]:
    """What the commands took, what was refused, and what a whole model would take."""
    seconds, per_block, estimated = [], [], []
    memory: list[list[Any]] = [[*case.cells(), None, None, "refused", None] for case in refused]
    points = dict[str, dict[int, float]]()
    for case, (plan, runs) in found.items():
        parts = split(run := runs[0])
        moving = 100 * sum(parts[name] for name in READING + WRITING) / run.wall
        seconds.append([*case.cells(), run.wall, *parts.values(), moving])
        planned, windows = run.document["memory"]["planned"], len(run.document["windows"])
        within = "yes" if run.peak <= parse_size(case.cap) else "no"
        memory.append([*case.cells(), planned / 1e9, run.peak / 1e9, within, windows])
        estimated.append([*case.cells(), *commands.estimate_cells(plan, run)])
        if case.cap != main_cap:
            continue
        solve = parts["solve"] / (case.blocks * (case.tasks - 1))  # the first task is taken as it is
        shares = [solve * part / sum(stages.values()) for part in stages.values()]
        read, write = (sum(parts[name] for name in names) / case.blocks for names in (READING, WRITING))
        per_block.append([*case.cells(), read / case.tasks, *shares, write / case.tasks])
        points.setdefault("the whole command", {})[case.blocks] = _worked(run)
        for number, steps in enumerate(zip(*(one.document["steps"][1:] for one in runs), strict=True), 2):
            spent = (step["timings"]["solve"] - step["timings"].get("compile", 0.0) for step in steps)
            points.setdefault(f"task {number}", {})[case.blocks] = min(spent)
    rows = []
    for what, values in points.items():
        at, off = line(values, whole)
        rows.append([what, *values.values(), at, at / 60, off])
    sizes = [f"{n} blocks" for n in next(iter(points.values()))]
    how = ("decompose", "adam", "fuse")
    return [
        records.table(
            SECONDS, (*CASE, "wall", *split(next(iter(found.values())).runs[0]), "reading and writing, %"), seconds
        ),
        records.table(MEMORY, (*CASE, "planned GB", "peak GB", "within the cap", "windows"), memory),
        records.table(PER_BLOCK, (*CASE, "read", *how, "write"), per_block),
        records.table(
            LINEAR,
            ("seconds of", *sizes, f"{whole} blocks, extrapolated", "minutes", "worst off the line, %"),
            rows,
        ),
        records.table(ESTIMATE, (*CASE, *commands.ESTIMATED), estimated),
    ]


def eager_table(inputs: Inputs, config: NufiltConfig, steps: int) -> records.Json:
    """The eager procedure beside the package's, on the same matrices."""
    ours, total = block_stages(inputs, config), solve_total(inputs, config)
    eager = eager_seconds(inputs, config, steps)
    rows = [["published, eager", *(eager[part] for part in (*ours, "total")), steps, 1.0]]
    rows.append(["nufilt_jax", *ours.values(), total, config.steps, eager["total"] / total])
    columns = ("procedure", *(f"{part} s" for part in (*ours, "total")), "Adam steps timed", "times as fast")
    return records.table(EAGER, columns, rows)


def spread_table(runs: Mapping[int, Run]) -> records.Json:
    """What dividing the layers among simulated devices costs."""
    solve = {n: commands.solve_seconds(run) for n, run in runs.items()}
    one = next(iter(solve.values()))
    rows = [[n, run.wall, solve[n], 100 * (solve[n] / one - 1)] for n, run in runs.items()]
    return records.table(SPREAD, ("devices", "wall s", "solve s", "longer than the first by, %"), rows)


def measure_all(options: argparse.Namespace, folder: Path) -> list[records.Json]:
    """Runs everything, size after size; of each only the models in use are on the disk, unless a folder is kept."""
    [version] = commands.versions(None)
    config, found, spread, refused = NufiltConfig(), dict[Case, Found](), dict[int, Run](), list[Case]()
    wanted, main_cap = cases(options.blocks, options.tasks, options.max_memory), _middle(options.max_memory)
    for blocks in options.blocks:
        model, here = models.Llama(options.width, options.inner, blocks, options.vocabulary), folder / str(blocks)
        models.write_models(here, model, options.tasks)
        for case in (case for case in wanted if case.blocks == blocks):
            script.say(f"{case.blocks} blocks, {case.tasks} tasks, {case.cap}")
            try:
                repeat = options.repeat if case.cap == main_cap else 1
                found[case] = measured(case, repeat, here, version)
            except commands.FailedError as error:  # a cap below the least that works is refused before any work
                script.say(str(error))
                refused.append(case)
        if blocks == options.blocks[0]:
            spread = {n: spread_over(n, here, version) for n in options.devices}
        if options.folder is None:
            shutil.rmtree(here)
    script.say("one block, stage by stage")
    inputs = block_inputs(models.Llama(options.width, options.inner, 1, options.vocabulary), config)
    stages = block_stages(inputs, config)
    others = [spread_table(spread)]
    if not options.no_eager:
        script.say("a matrix of each shape, as published")
        others.append(eager_table(one_of_each(inputs), config, options.eager_steps))
    return [*tables(found, refused, stages, main_cap, options.whole), *others]


def main() -> None:
    """Parses the command line, makes the models, runs everything."""
    parser, positive, model = script.Parser(__doc__, "scale.json"), script.at_least(1), models.Llama(4096, 11008)
    parser.add_argument("--blocks", type=positive, nargs="+", default=BLOCKS, help="default: 2 4 8")
    parser.add_argument("--tasks", type=script.at_least(2), default=3, help="number of tasks (default: 3)")
    parser.add_argument("--max-memory", nargs="+", default=CAPS, metavar="SIZE", help="default: 4GB 8GB 16GB")
    parser.add_argument("--repeat", type=positive, default=1, help="runs of a size under the middle cap (default: 1)")
    parser.add_argument("--devices", type=positive, nargs="+", default=DEVICES, help="simulated (default: 1 2 4)")
    parser.add_argument("--whole", type=positive, default=WHOLE, help="blocks of the model asked about (default: 32)")
    parser.add_argument("--width", type=positive, default=model.width, help="default: 4096")
    parser.add_argument("--inner", type=positive, default=model.inner, help="default: 11008")
    parser.add_argument("--vocabulary", type=positive, default=512, help="rows of the embedding (default: 512)")
    parser.add_argument("--folder", type=Path, help="where to make the models, and keep them (default: nowhere)")
    parser.add_argument("--no-eager", action="store_true", help="leave out the published procedure, which needs torch")
    steps = NufiltConfig().steps
    parser.add_argument(
        "--eager-steps", type=positive, default=steps, help=f"Adam steps of it that are timed (default: {steps})"
    )
    options = parser.parse_args()
    with parser.refusals(), commands.working_folder(options.folder) as folder:
        found = measure_all(options, folder)
    about = script.settings(options) | {"folder": None}
    document = {"environment": measure.environment("torch"), "about": about, "tables": found}
    records.finish(document, options.json or records.RESULTS / "scale.json")


if __name__ == "__main__":
    main()
