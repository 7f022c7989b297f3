"""Compiles the solve of one task for a TPU that is not there: what a first run on one waits for, and whether it fits.

Needs libtpu (`pip install nufilt_jax[tpu]`), and no TPU; only one such process runs at a time: libtpu holds a lock.
What is compiled is the program that always runs, for all layers of one input width at once, as on an accelerator; and
with --repair-up-to also the one that seldom does, for a layer without a certificate. Seconds are of these processors.

"about ms" is an estimate, no measurement: operations as a plan counts them, at the chip's published rate of products of
bfloat16, of which one product in float32 takes six.
"""

import argparse
import functools
import os
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.common import measure, records, script, shapes
from nufilt_jax import NufiltConfig
from nufilt_jax.core.solve import solve_group
from nufilt_jax.engine.estimate import solve_flops
from nufilt_jax.linalg.programs import options
from nufilt_jax.methods.stacked import Group

# 2 x 2 chips of each generation, the smallest that libtpu describes; one is compiled for.
CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
MEMORY = {"v5e": 16e9, "v6e": 32e9}  # bytes, as published
RATE = {"v5e": 197e12, "v6e": 918e12}  # operations per second on bfloat16, as published
PASSES = 6  # products of bfloat16 in one at `highest` precision
TITLE = "the solve of one task, compiled for a TPU"
COLUMNS = (
    "model",
    "chip",
    "program",
    "layers",
    "trace s",
    "compile s",
    "code MB",
    "arguments GB",
    "temporaries GB",
    "memory GB",
)
COLUMNS += ("fits", "loops", "products", "float64", "about ms")


class Compiled(NamedTuple):
    """A program, the processor seconds that it took, and the operations of one run."""

    program: Any
    traced: float
    compiled: float
    flops: float


def describe(chip: str) -> Any:
    """A device to compile for; no TPU needs to be there.

    Raises:
      RuntimeError: libtpu is missing.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks a cloud's metadata server what it runs on
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]


def compile_group(group: Group, sizes: dict[str, shapes.Shape], device: Any, *, repair: bool = False) -> Compiled:
    """The main program of a group of layers, new D over the old; or one layer's of its last stack, tried harder."""
    config = NufiltConfig()
    stacks = [(len(names), *sizes[names[0]]) for names in group.stacks]
    if repair:
        stacks = [(1, *stacks[-1][1:])]

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=SingleDeviceSharding(device))

    deltas = tuple(array(*shape) for shape in stacks)
    start = array(sum(shape[0] for shape in stacks), config.trained_rank, group.width)
    solve = functools.partial(solve_group, config=config, add=True, until_certified=repair)
    begun = time.process_time()
    lowered = jax.jit(solve, donate_argnums=0).lower(deltas, deltas, start)
    traced = time.process_time()
    program = lowered.compile(options("tpu"))
    flops = solve_flops((((m, n), n_layers) for n_layers, m, n in stacks), config)
    return Compiled(program, traced - begun, time.process_time() - traced, flops)


def n_products(program: Any) -> int:
    """Matrix products in a program's text, those of its loops once each."""
    return len(re.findall(r" (?:dot|convolution)\(", program.as_text()))


def n_loops(program: Any) -> int:
    """Loops in a program's text."""
    return len(re.findall(r" while\(", program.as_text()))


def row(model: str, chip: str, kind: str, n_layers: int, found: Compiled) -> list[Any]:
    """One compiled program in the table."""
    program = found.program
    memory = program.memory_analysis()
    taken = [memory.argument_size_in_bytes, memory.temp_size_in_bytes]
    code = memory.generated_code_size_in_bytes
    fits = "yes" if sum(taken) + code < MEMORY[chip] else "no"
    sizes = [code / 1e6, *(x / 1e9 for x in taken), MEMORY[chip] / 1e9]
    counts = [n_loops(program), n_products(program), program.as_text().count("f64[")]
    about = 1e3 * PASSES * found.flops / RATE[chip] if kind == "main" else None
    return [model, chip, kind, n_layers, found.traced, found.compiled, *sizes, fits, *counts, about]


def model_and_blocks(text: str) -> tuple[str, int | None]:
    """Type of an argument: a model, with :N only its first N blocks."""
    name, colon, blocks = text.partition(":")
    if name not in shapes.MODELS or (colon and not blocks.isdecimal()) or blocks == "0":
        raise argparse.ArgumentTypeError(f"must be MODEL or MODEL:BLOCKS of {', '.join(shapes.MODELS)}, got {text}")
    return name, int(blocks) if colon else None


def main() -> None:
    """Parses the command line and compiles."""
    parser = script.Parser(__doc__, "tpu_compile.json")
    every = [("vit-b32", None), ("vit-l14", None), ("llava-1.5-7b", 1)]
    parser.add_argument(
        "--models",
        nargs="+",
        type=model_and_blocks,
        metavar="MODEL[:BLOCKS]",
        default=every,
        help=f"of {', '.join(shapes.MODELS)}, with :N the first N blocks of each tower alone; "
        "default: vit-b32 vit-l14 llava-1.5-7b:1",
    )
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), help="default: all")
    parser.add_argument(
        "--repair-up-to",
        type=script.at_least(0),
        default=0,
        metavar="WIDTH",
        help="also what seldom runs, of layers at most so wide (default: 0): of 4096 inputs it takes over half an hour",
    )
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    found = []
    for chip in arguments.chips:
        try:
            device = describe(chip)
        except RuntimeError:
            parser.error("libtpu is missing (pip install nufilt_jax[tpu])")
        for model, blocks in arguments.models:
            sizes = shapes.layer_shapes(model, blocks)
            part = "" if blocks is None else f", {blocks} block" + "s" * (blocks > 1)
            for group in shapes.grouped(sizes):
                name = f"{model}{part}, width {group.width}"
                script.say(f"{name}, for {chip}")
                found.append(row(name, chip, "main", len(group.names), compile_group(group, sizes, device)))
                if group.width <= arguments.repair_up_to:
                    found.append(row(name, chip, "repair", 1, compile_group(group, sizes, device, repair=True)))
    document = {
        "environment": measure.environment(),
        "about": script.settings(arguments),
        "tables": [records.table(TITLE, COLUMNS, found)],
    }
    records.finish(document, arguments.json or records.RESULTS / "tpu_compile.json")


if __name__ == "__main__":
    main()
