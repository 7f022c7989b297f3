"""Prints the paper's Table 5 (arXiv:2509.21413v2; ViT-B/32, 8 tasks) beside a merge of the same size on this machine.

The merge is in memory: synthetic task vectors (benchmarks/common/shapes.py) on the device, one solve after another. Its
solving time is that of the Adam steps alone, as in the paper; its total is the whole merge.
"""

import argparse
import dataclasses
from typing import Any

import jax

from benchmarks.common import measure, paper_tables, records, script, shapes
from benchmarks.common.records import Json
from benchmarks.common.shapes import Inputs
from benchmarks.speed.package_solve import Merge, stages, to_device
from benchmarks.speed.solve import add_problem_options, merge_inputs
from nufilt_jax.methods.nufilt import NufiltConfig

MODEL = "vit-b32"
ITERATIONS = (25, 50, 100)
COLUMNS = ("method", "iterations", "solve s", "total s", "where")


def main() -> None:
    """Parses the command line."""
    script.prepare_process()
    parser = script.Parser(__doc__, "steps_PLATFORM.json")
    add_problem_options(parser)
    parser.add_argument(
        "--iterations", type=script.at_least(1), nargs="+", default=list(ITERATIONS), help="Adam steps of each merge"
    )
    parser.add_argument("--tasks", type=script.at_least(2), default=8, help="tasks to merge (default: 8)")
    options = parser.parse_args()
    document = run(options)
    records.finish(document, options.json or records.RESULTS / f"steps_{jax.default_backend()}.json")


def paper_rows() -> list[list[Any]]:
    """Table 5 as published; what it leaves open stays empty."""
    return [[row.model, row.iterations, row.solve_s, row.total_s, "paper"] for row in paper_tables.overhead()]


def run(options: argparse.Namespace) -> Json:
    """Merges once per number of iterations."""
    environment, neighbours = measure.environment(), measure.Neighbours()
    layers = shapes.layer_shapes(MODEL, options.layers)
    config = NufiltConfig(decomposition=options.decomposition)
    first = shapes.inputs(layers, config.adapter_rank, alpha=options.alpha)
    tasks = merge_inputs(layers, first, config, options)
    rows = []
    for iterations in options.iterations:
        script.say(f"{iterations} iterations")
        settings = dataclasses.replace(config, steps=iterations)
        rows.append(["nufilt_jax", iterations, *_seconds(tasks, settings, options.repeats), records.where(environment)])
    blocks = f", {options.layers} blocks alone" if options.layers else ""
    title = f"Table 5, ViT-B/32, 8 tasks; nufilt_jax: {options.tasks} tasks in memory{blocks}"
    return {
        "benchmark": "steps",
        "config": dataclasses.asdict(config),
        "environment": environment,
        "layers": shapes.shape_counts(layers.values()),
        "percent_cpu_of_others": neighbours.percent(),
        "settings": script.settings(options),
        "tables": [records.table(title, COLUMNS, paper_rows() + rows)],
    }


def _seconds(tasks: list[Inputs], config: NufiltConfig, repeats: int) -> tuple[float, float]:
    """Of all Adam steps of a merge, and of the whole merge; medians."""
    adam = stages(to_device(tasks[0]), config, repeats, count=False)["adam"]
    return adam.times.median * len(tasks), Merge(tasks, config).times(repeats).median


if __name__ == "__main__":
    main()
