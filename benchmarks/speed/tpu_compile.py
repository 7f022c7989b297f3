"""Compiles the solve of one task for a TPU that is not there: what a first run on one waits for, and whether it fits.

Needs libtpu (`pip install nufilt_jax[tpu]`), and no TPU; only one such process runs at a time: libtpu holds a lock.
What is compiled is the program that always runs, for all layers of one input width at once, as on an accelerator.
Seconds are of this machine's processors.
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
from nufilt_jax.methods.stacked import Group

# 2 x 2 chips of each generation, the smallest that libtpu describes; one is compiled for.
CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
MEMORY = {"v5e": 16e9, "v6e": 32e9}  # bytes, as published
TITLE = "the solve of one task, compiled for a TPU"
COLUMNS = ("model", "chip", "layers", "trace s", "compile s", "code MB", "arguments GB", "temporaries GB", "memory GB")
COLUMNS += ("fits", "products", "float64")


class Compiled(NamedTuple):
    """A program, and the processor seconds that it took."""

    program: Any
    traced: float
    compiled: float


def compile_group(group: Group, sizes: dict[str, shapes.Shape], device: Any) -> Compiled:
    """The main program of a group of layers, new D over the old."""
    config = NufiltConfig()

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=SingleDeviceSharding(device))

    stacks = tuple(array(len(names), *sizes[names[0]]) for names in group.stacks)
    start = array(len(group.names), config.trained_rank, group.width)
    solve = jax.jit(functools.partial(solve_group, config=config, add=True, until_certified=False), donate_argnums=0)
    begun = time.process_time()
    lowered = solve.lower(stacks, stacks, start)
    traced = time.process_time()
    program = lowered.compile()
    return Compiled(program, traced - begun, time.process_time() - traced)


def row(model: str, chip: str, n_layers: int, found: Compiled) -> list[Any]:
    """One compiled program in the table."""
    memory, text = found.program.memory_analysis(), found.program.as_text()
    taken = [memory.argument_size_in_bytes, memory.temp_size_in_bytes]
    code = memory.generated_code_size_in_bytes
    n_products = len(re.findall(r" (?:dot|convolution)\(", text))
    fits = "yes" if sum(taken) + code < MEMORY[chip] else "no"
    sizes = [code / 1e6, *(x / 1e9 for x in taken), MEMORY[chip] / 1e9]
    return [model, chip, n_layers, found.traced, found.compiled, *sizes, fits, n_products, text.count("f64[")]


def main() -> None:
    """Parses the command line and compiles."""
    parser = script.Parser(__doc__, "tpu_compile.json")
    parser.add_argument("--models", nargs="+", choices=shapes.MODELS, default=["vit-b32"], help="default: vit-b32")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=["v5e"], help="default: v5e")
    parser.add_argument("--blocks", type=script.at_least(1), help="the first blocks of each model alone")
    arguments = parser.parse_args()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks a cloud's metadata server what it runs on
    jax.config.update("jax_enable_compilation_cache", False)
    found = []
    for chip in arguments.chips:
        try:
            device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
        except RuntimeError:
            parser.error("libtpu is missing (pip install nufilt_jax[tpu])")
        for model in arguments.models:
            sizes = shapes.layer_shapes(model, arguments.blocks)
            for group in shapes.grouped(sizes):
                script.say(f"{model}, width {group.width}, for {chip}")
                compiled = compile_group(group, sizes, device)
                found.append(row(f"{model}, width {group.width}", chip, len(group.names), compiled))
    document = {
        "environment": measure.environment(),
        "about": {"blocks": arguments.blocks},
        "tables": [records.table(TITLE, COLUMNS, found)],
    }
    records.finish(document, arguments.json or records.RESULTS / "tpu_compile.json")


if __name__ == "__main__":
    main()
