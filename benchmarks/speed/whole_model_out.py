"""Writing a whole model out of merged adapters, beside copying its base's file: how much of the disk's rate is reached.

The base is synthetic, with a 7B Llama's matrices in bfloat16 at as many blocks as the disk takes, and adapters are
merged into it in closed form by the command. Both are timed until they are on the disk; the file is copied before the
command and after it, each time twice, and the fastest counts. What the products of the factors take at the rate of
large products says how near the copy's time a writer can come.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import measure, models, records, script
from benchmarks.speed.lora import Model, in_factors, write_adapter

COLUMNS = (
    "blocks",
    "GB",
    "write model s",
    "of this compiling s",
    "copy s",
    "% of copy rate",
    "products at full rate, % of copy",
    "whole run s",
    "peak GiB",
)


def written(folder: Path, model: Model, rank: int, tasks: int, cap: str, rate: float) -> list[Any]:
    """The row of one model, on a machine of so many GFLOP/s."""
    models.write_models(folder, models.Llama(model.width, model.hidden, model.blocks, vocabulary=256), 0)
    for task in range(tasks):
        write_adapter(folder / f"task{task}", model, rank, task)
    file = folder / "base" / models.WEIGHTS
    copies = [copied(file)]
    found = in_factors(folder, tasks, "closed_form", cap, folder / "out", output="model")
    copies.append(copied(file))
    seconds = found["timings"]["write_model"]
    told = [found["timings"]["compile"], min(copies), 100 * min(copies) / seconds]
    least = sum(2 * m * n * rank * tasks for m, n in model.shapes().values()) / (1e9 * rate)
    size = file.stat().st_size / 1e9
    return [model.blocks, size, seconds, *told, 100 * least / min(copies), found["wall"], found["peak"] / measure.GIB]


def copied(file: Path) -> float:
    """Seconds of copying a file until the copy is on the disk, the faster of two times."""
    seconds = []
    for _ in range(2):
        copy = file.with_suffix(".copy")
        start = time.perf_counter()
        shutil.copyfile(file, copy)
        with copy.open("rb") as reread:
            os.fsync(reread.fileno())
        seconds.append(time.perf_counter() - start)
        copy.unlink()
    return min(seconds)


def main() -> None:
    """Parses the command line."""
    parser = script.Parser(__doc__, "whole_model_out.json")
    positive = script.at_least(1)
    parser.add_argument("--blocks", type=positive, nargs="+", default=(2, 4, 8), help="of the model (default: 2 4 8)")
    parser.add_argument("--width", type=positive, default=4096, help="of the model (default: 4096)")
    parser.add_argument("--hidden", type=positive, default=11008, help="feed-forward (default: 11008)")
    parser.add_argument("--rank", type=positive, default=16, help="of the adapters (default: 16)")
    parser.add_argument("--tasks", type=positive, default=8, help="adapters (default: 8)")
    parser.add_argument("--max-memory", default="2GB", metavar="SIZE", help="of the command (default: 2GB)")
    options = parser.parse_args()
    rows, rates = [], measure.machine_rates()
    for blocks in options.blocks:
        script.say(f"{blocks} blocks")
        model = Model(blocks, options.width, options.hidden)
        with tempfile.TemporaryDirectory() as folder:
            given = options.rank, options.tasks, options.max_memory, rates.matmul
            rows.append(written(Path(folder), model, *given))
    title = f"a whole model out of {options.tasks} adapters of rank {options.rank}"
    document = {
        "benchmark": "whole_model_out",
        "environment": measure.environment(),
        "machine": rates._asdict(),
        "settings": script.settings(options),
        "tables": [records.table(title, COLUMNS, rows)],
    }
    records.finish(document, options.json or records.RESULTS / "whole_model_out.json")


if __name__ == "__main__":
    main()
