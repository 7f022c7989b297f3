"""Seconds per task and peak memory of every merging method, on all tensors of ViT-B/32's vision tower.

Synthetic weights, the same for all methods (benchmarks/common/models.py). Each method runs in a process of its own,
one after another: two tasks that do not count, then the timed ones. Compilation is apart. Methods that learn from
examples get random images. Those that do nothing but pass over memory are held against the machine's copy rate.
"""

import json
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.common import commands, measure, models, records, script
from benchmarks.common.models import Tower
from nufilt_jax import methods
from nufilt_jax.engine.timing import CompileLog
from nufilt_jax.evaluation.learning_data import clip_task_data
from nufilt_jax.methods import RULES, TaskData
from nufilt_jax.methods.stacked import Names, TaskVector

COLUMNS = ("method", "compile s", "min s", "median s", "GB/s", "% of copy rate", "peak GiB")
WARM_UP = 2  # tasks: the first has programs of its own, the second compiles the others
CLASSES = 10
ONE_PASS = ("sum", "weight_average", "task_arithmetic", "magmax")  # read D and τ, write D: 12 bytes a number


def run_alone(method: str, tower: Tower, repeats: int) -> records.Json:
    """One method, in this process: seconds of each timed task and of all compilation, numbers touched."""
    base = {name: models.pretrained(name, shape) for name, shape in tower.shapes().items()}
    rule = methods.get(method)
    state = rule.init(base)
    vectors = [_vector(state.delta.names, tower, task) for task in (0, 1)]
    seconds, compiling = [], 0.0
    for step in range(WARM_UP + repeats):
        vector, data, log = vectors[step % 2], _examples(method, tower, step), CompileLog()
        with log.listening():
            start = time.perf_counter()
            state = rule.update(state, vector, donate=True, data=data)
            jax.block_until_ready((state.delta, state.added))
            wall = time.perf_counter() - start
        compiled = log.as_dict()["seconds"]
        compiling += compiled
        seconds.append(wall - compiled)
    return {
        "seconds": seconds[WARM_UP:],
        "compile": compiling,
        "numbers": sum(x.size for x in state.delta.stacks),
    }


def _vector(names: Names, tower: Tower, task: int) -> TaskVector:
    shapes = tower.shapes()
    stacks = (np.stack([models.task_vector(name, shapes[name], task) for name in members]) for members in names)
    return TaskVector(tuple(jax.device_put(stack) for stack in stacks), names)


def _examples(method: str, tower: Tower, seed: int) -> TaskData | None:
    """Random images for the methods that learn from some."""
    if not RULES[method].needs_data:
        return None
    config: Any = RULES[method].config()
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES), config.examples_per_class)
    images = rng.standard_normal((len(labels), 3, 224, 224), np.float32)
    head = rng.standard_normal((CLASSES, tower.width)).astype(np.float32)
    head /= np.linalg.norm(head, axis=1, keepdims=True)
    draw = {"steps": config.steps, "batch_size": config.batch_size, "examples_per_class": config.examples_per_class}
    return TaskData(*clip_task_data(images, head, labels, tower.config(), seed=seed, **draw))


def run_all(names: list[str], tower: Tower, repeats: int, copy_rate: float) -> list[list[Any]]:
    """The table's rows, each from a process of its own."""
    rows = []
    for name in names:
        script.say(name)
        ran = commands.run_module("benchmarks.speed.methods", "--alone", given=[name, tower, repeats])
        found = ran.document
        least, middle = min(found["seconds"]), statistics.median(found["seconds"])
        rate = 12e-9 * found["numbers"] / least if name in ONE_PASS else None
        share = None if rate is None else 100 * rate / copy_rate
        rows.append([name, found["compile"], least, middle, rate, share, ran.peak / measure.GIB])
    return rows


def _title(tower: Tower) -> str:
    size = "ViT-B/32's vision tower" if tower == Tower() else f"a tower of {tower.blocks} blocks, {tower.width} wide"
    return f"One task by every method, {size}"


def main() -> None:
    """Parses the command line."""
    parser = script.Parser(__doc__, "methods_PLATFORM.json")
    parser.add_argument(
        "--methods", choices=RULES, nargs="+", default=list(RULES), metavar="METHOD", help=", ".join(RULES)
    )
    parser.add_argument("--blocks", type=script.at_least(1), default=12, help="of the tower (default: 12)")
    parser.add_argument("--width", type=script.at_least(1), default=768, help="of the tower (default: 768)")
    parser.add_argument("--repeats", type=script.at_least(1), default=3, help="timed tasks (default: 3)")
    parser.add_argument("--alone", metavar="JSON", help="run one method in this process; the script calls itself so")
    options = parser.parse_args()
    if options.alone:
        name, tower, repeats = json.loads(options.alone)
        sys.stdout.write(json.dumps(run_alone(name, Tower(*tower), repeats)))
        return
    environment = measure.environment()
    rates = measure.machine_rates()
    tower = Tower(width=options.width, blocks=options.blocks)
    rows = run_all(options.methods, tower, options.repeats, rates.copy)
    document = {
        "benchmark": "methods",
        "dtype": "float32",
        "environment": environment,
        "machine": rates._asdict(),
        "settings": {"width": tower.width, "blocks": tower.blocks, "repeats": options.repeats},
        "tables": [records.table(_title(tower), COLUMNS, rows)],
    }
    records.finish(document, options.json or records.RESULTS / f"methods_{environment['platform']}.json")


if __name__ == "__main__":
    main()
