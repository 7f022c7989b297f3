"""Times the whole command, `python -m nufilt_jax.merge`, on models of ViT-B/32's true size, and measures its memory.

The models are synthetic (random weights, task vectors with a power-law spectrum) and are written first, so that their
files are in the page cache unless --evict is given. The command runs in a fresh process and says itself where its time
goes; one short run before fills its compile cache. Its --plan is asked just before for how long it will take.
"""

import argparse
import functools
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.common import commands, measure, models, records, script
from benchmarks.common.commands import Run, Version
from benchmarks.common.models import Tower

TASKS = (8, 14, 20)
FEWEST = 3  # tasks of the run that fills the compile cache: the third compiles nothing
SECONDS, HIDDEN, GROWTH = "seconds of the whole command", "seconds in the background", "growth with the number of tasks"
ESTIMATE, COMPARED = "estimate beside the run", "seconds before and now"


def run_command(folder: Path, n_tasks: int, version: Version, *, cold: bool = False, evict: bool = False) -> Run:
    """Merges the first tasks of a folder of models; removes the merged model again.

    Args:
      folder: with the models; the compile caches are in it too.
      n_tasks: how many.
      version: of the package.
      cold: empty its compile cache before.
      evict: drop the models' files from the page cache before.
    """
    if cold:
        commands.empty_compile_cache(folder, version)
    if evict:
        _evict([folder / name for name in models.names(n_tasks)])
    return commands.merge(folder, commands.sources(folder, n_tasks), version)


def _evict(folders: list[Path]) -> None:
    for path in (path for folder in folders for path in folder.iterdir()):
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
        "compile": commands.compile_seconds(run),
        "solve": commands.solve_seconds(run),
        "write state": timings["write_state"],
        "write model": timings["write_model"],
    }
    return {"start, end": run.wall - sum(parts.values()), **parts}


def tables(runs: Mapping[int, Run], plans: Mapping[int, records.Json], tower: Tower) -> list[records.Json]:
    """A row per number of tasks, how the wall time grows with it, and what the plans had said."""
    limit = 3 * tower.n_bytes + measure.GIB
    rows, hidden, estimated = [], [], []
    for n_tasks, run in runs.items():
        parts, steps = split(run), run.document["steps"]
        rest = 100 * (1 - parts["solve"] / run.wall)
        rows.append([n_tasks, run.wall, *parts.values(), rest, run.peak / measure.GIB, limit / measure.GIB])
        read, put = (sum(step["timings"][part] for step in steps) for part in ("read", "put"))
        hidden.append([n_tasks, read, put, commands.compiled(run, "programs"), commands.compiled_anew(run)])
        estimated.append([n_tasks, *commands.estimate_cells(plans[n_tasks], run)])
    columns = ("tasks", "wall", *split(next(iter(runs.values()))), "not solving, %", "peak GiB", "limit GiB")
    found = [
        records.table(SECONDS, columns, rows),
        records.table(HIDDEN, ("tasks", "read", "put", "programs", "compiled anew"), hidden),
    ]
    if len(runs) > 2:
        found.append(_growth({n_tasks: run.wall for n_tasks, run in runs.items()}))
    return [*found, records.table(ESTIMATE, ("tasks", *commands.ESTIMATED), estimated)]


def _growth(wall: dict[int, float]) -> records.Json:
    """A straight line through the wall times, and how far they are off it."""
    slope, start = (float(x) for x in np.polyfit(list(wall), list(wall.values()), 1))
    rows = [[n, seconds, start + slope * n, 100 * (seconds / (start + slope * n) - 1)] for n, seconds in wall.items()]
    rows.append(["per task", slope, None, None])
    return records.table(GROWTH, ("tasks", "wall", "line", "off it, %"), rows)


def compared(before: Mapping[int, Run], now: Mapping[int, Run]) -> records.Json:
    """Two versions beside each other."""
    rows = []
    for n_tasks, run in now.items():
        cells = [n_tasks]
        for seconds in (lambda one: one.wall, commands.solve_seconds):
            pair = seconds(before[n_tasks]), seconds(run)
            cells += [*pair, pair[1] / pair[0]]
        rows.append(cells)
    columns = [f"{what} {how}" for what in ("wall", "solve") for how in ("before", "now", "now / before")]
    return records.table(COMPARED, ("tasks", *columns), rows)


def measured(options: argparse.Namespace, folder: Path, tower: Tower, versions: list[Version]) -> list[records.Json]:
    """Runs everything the options ask for, and makes the tables of it."""
    models.write_models(folder, tower, max(*options.tasks, FEWEST))
    for version in () if options.cold else versions:
        script.say(f"filling the compile cache of {version.name}")
        run_command(folder, FEWEST, version)
    runs: dict[str, dict[int, Run]] = {version.name: {} for version in versions}
    plans, this = {}, versions[-1]
    for n_tasks in options.tasks:
        script.say(f"merging {n_tasks} tasks")
        plans[n_tasks] = commands.plan(folder, commands.sources(folder, n_tasks), this)
        call = functools.partial(run_command, folder, n_tasks, cold=options.cold, evict=options.evict)
        for name, found in commands.alternating(versions, options.repeat, call).items():
            runs[name][n_tasks] = commands.least(found)
    others = [compared(runs[version.name], runs[this.name]) for version in versions[:-1]]
    return [*tables(runs[this.name], plans, tower), *others]


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
    parser.add_argument("--repeat", type=positive, default=1, help="runs of each, of which the fastest counts")
    commands.add_before(parser)
    options = parser.parse_args()
    tower, versions = Tower(options.width, options.blocks), commands.versions(options.before)
    with commands.working_folder(options.folder) as folder:
        found = measured(options, folder, tower, versions)
    how = f"compile cache {'cold' if options.cold else 'warm'}, files {'cold' if options.evict else 'warm'}"
    about = {"tower": tower._asdict(), "model_bytes": tower.n_bytes, "how": how, "repeat": options.repeat}
    about |= {"versions": [version.name for version in versions]}
    document = {"environment": measure.environment(), "about": about, "tables": found}
    records.finish(document, options.json or records.RESULTS / "end_to_end.json")


if __name__ == "__main__":
    main()
