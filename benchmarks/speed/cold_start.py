"""Measures what a user waits for before the first result.

Each command runs in a fresh process, first with an empty compile cache, then with the full one; apart from that is
measured what is spent before anything is merged. Cases: `tiny` is the built-in study, evaluation and all, whose
checkpoints are made before. The others merge two synthetic tasks: of ViT-B/32, of ViT-L/14, of one block of a Llama
of 7B.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import commands, measure, models, records, script
from benchmarks.common.commands import MERGE, Run, Version
from benchmarks.common.models import Llama, Model, Tower

TINY = "tiny"
MODELS: dict[str, Model] = {
    "vit-b32": Tower(),
    "vit-l14": Tower(width=1024, blocks=24, patch=14),
    "llama-7b-block": Llama(width=4096, inner=11008, blocks=1, vocabulary=256),
}
CASES = (TINY, *MODELS)
N_TASKS = 2
CACHES = ("empty", "full")
STARTED = {  # arguments, and the status that they end with
    "--help": ((*MERGE, "--help"), 0),
    "a usage error": ((*MERGE, "--model"), 2),
    "import, and touch solve_stack": (("-c", "import nufilt_jax; nufilt_jax.solve_stack"), 0),
}
WAITED, START, ESTIMATE = "until the first results", "processor seconds before any merge", "estimate beside the run"
COLUMNS = ("case", "version", "cache", "wall s", "processor s", "first task s", "second task s")
COLUMNS += ("compile s", "programs", "compiled anew")


class Pair(NamedTuple):
    """A command with an empty compile cache, and then with the one that it has filled."""

    empty: Run
    full: Run


def run_pair(case: str, folder: Path, version: Version) -> Pair:
    """Runs one case twice."""
    commands.empty_compile_cache(folder, version)
    empty, full = (commands.merge(folder, options(case, folder), version) for _ in CACHES)
    return Pair(empty, full)


def options(case: str, folder: Path) -> list[str | Path]:
    """What the command is to merge."""
    return ["--model", TINY] if case == TINY else commands.sources(folder, N_TASKS)


def prepare(case: str, folder: Path, versions: list[Version]) -> None:
    """Makes a case's models; those of the study are made by the command itself, where it runs first."""
    folder.mkdir(parents=True, exist_ok=True)
    if case != TINY:
        models.write_models(folder, MODELS[case], N_TASKS)
        return
    for version in versions:
        commands.merge(folder, options(case, folder), version)


def rows(case: str, version: Version, pairs: list[Pair]) -> list[list[str | float | None]]:
    """The fastest run with each state of the cache."""
    found = []
    for cache, run in zip(CACHES, _least(pairs), strict=True):
        tasks = [step.get("seconds") for step in run.document["steps"][:2]]
        told = [commands.compiled(run, key) for key in ("seconds", "programs")]
        times = [run.wall, run.processor, *tasks, *told, commands.compiled_anew(run)]
        found.append([case, version.name, cache, *times])
    return found


def _least(pairs: list[Pair]) -> Pair:
    return Pair(*(commands.least(runs) for runs in zip(*pairs, strict=True)))


def estimated(case: str, plan: records.Json, pairs: list[Pair]) -> list[list[str | float | None]]:
    """What the plan had said; seconds not of the study, of which most goes into its evaluation."""
    found = []
    for cache, run in zip(CACHES, _least(pairs), strict=True):
        cells = [None] * len(commands.ESTIMATED) if case == TINY else commands.estimate_cells(plan, run)
        planned = plan["memory"]["planned"]
        found.append([case, cache, *cells, planned / 1e9, run.peak / 1e9, planned / run.peak])
    return found


def started(folder: Path, versions: list[Version], repeat: int) -> records.Json:
    """Processor seconds of what needs no model, after one run that does not count."""
    table: dict[str, list[str | float]] = {version.name: [version.name] for version in versions}
    for arguments, status in STARTED.values():
        for name, found in commands.alternating(versions, repeat + 1, _starter(folder, arguments, status)).items():
            table[name].append(min(run.processor for run in found[1:]))
    return records.table(START, ("version", *STARTED), list(table.values()))


def _starter(folder: Path, arguments: tuple[str, ...], status: int) -> Callable[[Version], Run]:
    return lambda version: commands.run(arguments, version, commands.cache_of(folder, version), status=status)


def compile_sources(version: Version) -> None:
    """Python's own compilation is no part of what is measured."""
    commands.run(("-m", "compileall", "-q", version.root / "nufilt_jax"), version, version.root)


def measured(options_given: argparse.Namespace, folder: Path, versions: list[Version]) -> list[records.Json]:
    """Runs everything the options ask for, and makes the tables of it."""
    for version in versions:
        compile_sources(version)
    start, waited, estimates = started(folder, versions, options_given.repeat), [], []
    for case in options_given.cases:
        script.say(case)
        place = folder / case
        prepare(case, place, versions)
        plan = commands.plan(place, options(case, place), versions[-1])
        pairs = commands.alternating(versions, options_given.repeat, functools.partial(run_pair, case, place))
        waited += [row for version in versions for row in rows(case, version, pairs[version.name])]
        estimates += estimated(case, plan, pairs[versions[-1].name])
    columns = ("case", "cache", *commands.ESTIMATED, "planned GB", "peak GB", "planned / peak")
    return [records.table(WAITED, COLUMNS, waited), start, records.table(ESTIMATE, columns, estimates)]


def main() -> None:
    """Parses the command line, makes the models, runs the commands."""
    parser = script.Parser(__doc__, "cold_start.json")
    positive = script.at_least(1)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--folder", type=Path, help="where to make the models, and keep them (default: nowhere)")
    parser.add_argument("--repeat", type=positive, default=1, help="runs of each, of which the fastest counts")
    commands.add_before(parser)
    given = parser.parse_args()
    versions = commands.versions(given.before)
    with commands.working_folder(given.folder) as folder:
        tables = measured(given, folder, versions)
    about = {"tasks": N_TASKS, "repeat": given.repeat, "versions": [version.name for version in versions]}
    about |= {"models": {case: models.about(MODELS[case]) for case in given.cases if case != TINY}}
    document = {"environment": measure.environment(), "about": about, "tables": tables}
    records.finish(document, given.json or records.RESULTS / "cold_start.json")


if __name__ == "__main__":
    main()
