"""Compiles the solve of one task for a TPU that is not there: what a first run on one waits for, and whether it fits.

Needs libtpu (`pip install nufilt_jax[tpu]`), and no TPU; only one such process runs at a time: libtpu holds a lock.
What is compiled is the program that always runs, for all layers of one input width at once, as on an accelerator; and
with --repair the one that seldom does, for a layer without a certificate. Seconds are of this machine's processors.
"""

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
from nufilt_jax.linalg.dispatch import options
from nufilt_jax.methods.stacked import Group

# 2 x 2 chips of each generation, the smallest that libtpu describes; one is compiled for.
CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
MEMORY = {"v5e": 16e9, "v6e": 32e9}  # bytes, as published
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
COLUMNS += ("fits", "loops", "products", "float64")


class Compiled(NamedTuple):
    """A program, and the processor seconds that it took."""

    program: Any
    traced: float
    compiled: float


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
    return Compiled(program, traced - begun, time.process_time() - traced)


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
    return [model, chip, kind, n_layers, found.traced, found.compiled, *sizes, fits, *counts]


def main() -> None:
    """Parses the command line and compiles."""
    parser = script.Parser(__doc__, "tpu_compile.json")
    parser.add_argument("--models", nargs="+", choices=shapes.MODELS, default=["vit-b32"], help="default: vit-b32")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=["v5e"], help="default: v5e")
    parser.add_argument("--blocks", type=script.at_least(1), help="the first blocks of each model alone")
    parser.add_argument("--repair", action="store_true", help="also what seldom runs")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    found = []
    for chip in arguments.chips:
        try:
            device = describe(chip)
        except RuntimeError:
            parser.error("libtpu is missing (pip install nufilt_jax[tpu])")
        for model in arguments.models:
            sizes = shapes.layer_shapes(model, arguments.blocks)
            for group in shapes.grouped(sizes):
                name = f"{model}, width {group.width}"
                script.say(f"{name}, for {chip}")
                found.append(row(name, chip, "main", len(group.names), compile_group(group, sizes, device)))
                if arguments.repair:
                    found.append(row(name, chip, "repair", 1, compile_group(group, sizes, device, repair=True)))
    document = {
        "environment": measure.environment(),
        "about": {"blocks": arguments.blocks},
        "tables": [records.table(TITLE, COLUMNS, found)],
    }
    records.finish(document, arguments.json or records.RESULTS / "tpu_compile.json")


if __name__ == "__main__":
    main()
