"""Measures the largest resident memory of the whole command, `python -m nufilt_jax.merge`, with and without a cap.

The models are synthetic (random weights, task vectors with a power-law spectrum) and are written first. What is counted
is everything: Python and JAX, D, task vectors, what is being read and written, and the mapped pages of files. A
multiple is of the bytes of the model in float32, the type that a merge computes in. A short run before fills the
compile cache; its --plan is asked just before for what it will take.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from benchmarks.common import commands, measure, models, records, script
from benchmarks.common.commands import Run, Version
from nufilt_jax.engine.memory import parse_size
from nufilt_jax.errors import NufiltError

METHODS = ("nufilt", "task_arithmetic", "weight_average")
LIMITS = {"nufilt": 4.0}  # multiples wanted; 3 for methods that keep D alone
FEWEST = 2  # tasks of the run that fills the compile cache: the second compiles what the first does not
TITLE = "largest resident memory of the whole command"
CAPPED, ESTIMATE = "under a cap", "estimate beside the run"
Cache = Literal["empty", "fill", "keep"]
CASE = ("method", "tasks", "cap GB")
SIZES = tuple(dict.fromkeys(name for kind in models.KINDS.values() for name in kind._fields if name != "dtype"))


class Case(NamedTuple):
    """One merge.

    Attributes:
      method: its name.
      n_tasks: how many.
      cap: as `--max-memory` takes it; None for none.
    """

    method: str
    n_tasks: int
    cap: str | None

    @property
    def cap_bytes(self) -> int | None:
        """The cap as a number."""
        return None if self.cap is None else parse_size(self.cap)

    def cells(self) -> list[str | int | float | None]:
        """The first of a row, see `CASE`."""
        return [self.method, self.n_tasks, None if self.cap_bytes is None else self.cap_bytes / 1e9]

    def options(self, folder: Path, n_tasks: int, steps: int | None) -> list[str | Path]:
        """Arguments of the command."""
        found = [*commands.sources(folder, n_tasks), "--method", self.method]
        found += [] if self.cap is None else ["--max-memory", self.cap]
        return found + (["--steps", str(steps)] if steps and self.method == "nufilt" else [])


class Found(NamedTuple):
    """A case that ran: what had been planned, and what it did."""

    plan: records.Json
    run: Run


Results = dict[Case, Found | None]


def measured(case: Case, folder: Path, version: Version, steps: int | None, cache: Cache) -> Found | None:
    """Runs one case; None if the package says beforehand that its cap is too little.

    Args:
      case: what to run.
      folder: with the models and the compile cache.
      version: of the package.
      steps: of Adam; None for the method's own.
      cache: what becomes of the compile cache before: it is emptied, filled by a short run, or kept.
    """
    options = case.options(folder, case.n_tasks, steps)
    try:
        plan = commands.plan(folder, options, version)
    except commands.FailedError as error:
        if case.cap is None or "are too little" not in str(error):
            raise
        return None
    if cache == "empty":
        commands.empty_compile_cache(folder, version)
    elif cache == "fill":
        commands.merge(folder, case.options(folder, min(FEWEST, case.n_tasks), steps), version)
    return Found(plan, commands.merge(folder, options, version))


def measure_all(cases: Sequence[Case], folder: Path, version: Version, steps: int | None, *, cold: bool) -> Results:
    """Runs all cases; the compile cache is emptied before each, or filled once for each method and cap."""
    found: Results = {}
    for case in cases:
        script.say(f"{case.method}, {case.n_tasks} tasks, {case.cap or 'no cap'}")
        is_filled = any((case.method, case.cap) == (other.method, other.cap) for other in found)
        cache: Cache = "empty" if cold else "keep" if is_filled else "fill"
        found[case] = measured(case, folder, version, steps, cache)
    return found


def document(found: Results, model: models.Model, how: records.Json) -> records.Json:
    """The results: a row per case, and what a cap costs."""
    rows, estimated = [], []
    for case, one in found.items():
        if one is None:
            continue
        plan, run = one
        planned, limit = run.document["memory"]["planned"], LIMITS.get(case.method, 3.0)
        sizes = [planned / 1e9, run.peak / 1e9, run.peak / model.n_bytes, limit]
        anew = commands.compiled_anew(run)
        rows.append([*case.cells(), *sizes, run.wall, planned / run.peak, anew])
        estimated.append([*case.cells(), *commands.estimate_cells(plan, run)])
    columns = (*CASE, "planned GB", "peak GB", "times the model in float32", "wanted at most", "seconds")
    columns += ("planned / peak", "compiled anew")
    tables = [records.table(TITLE, columns, rows)]
    if any(case.cap for case in found):
        tables.append(_capped(found))
    tables.append(records.table(ESTIMATE, (*CASE, *commands.ESTIMATED), estimated))
    about = {"model": models.about(model), "dtype": model.dtype, **how}
    return {"environment": measure.environment(), "about": about, "tables": tables}


def _capped(found: Results) -> records.Json:
    """What a cap costs; a cap that is refused has no run."""
    rows = []
    for case, one in found.items():
        free = found[case._replace(cap=None)]
        if (cap := case.cap_bytes) is None or free is None:
            continue
        start = [f"{case.method}, {case.n_tasks} tasks", cap / 1e9]
        if one is None:
            rows.append([*start, None, "refused", free.run.wall, None, None, None])
            continue
        run = one.run
        within, slower = "yes" if run.peak <= cap else "no", 100 * (run.wall / free.run.wall - 1)
        windows = len(run.document["windows"])
        rows.append([*start, run.peak / 1e9, within, free.run.wall, run.wall, slower, windows])
    columns = ("case", "cap GB", "peak GB", "within the cap", "seconds uncapped", "seconds capped", "slower by %")
    return records.table(CAPPED, (*columns, "windows"), rows)


def _size(text: str) -> str:
    """Type of an argument: a size as the command takes it."""
    try:
        parse_size(text)
    except NufiltError as error:
        raise argparse.ArgumentTypeError(error.problems[0].what) from error
    return text


def _model(parser: script.Parser, options: argparse.Namespace) -> models.Model:
    """The model that the options name; those that are not given are its own."""
    kind = models.KINDS[options.model]
    given = {name: value for name in (*SIZES, "dtype") if (value := getattr(options, name)) is not None}
    if strange := [name for name in given if name not in kind._fields]:
        parser.error(f"argument --{strange[0]}: a {options.model} has none")
    return kind(**given)


def _cases(methods: Sequence[str], tasks: Sequence[int], caps: Sequence[str]) -> list[Case]:
    return [Case(method, n_tasks, cap) for method in methods for n_tasks in tasks for cap in (None, *caps)]


def main() -> None:
    """Parses the command line, makes the models, runs the commands."""
    parser = script.Parser(__doc__, "memory.json")
    positive = script.at_least(1)
    parser.add_argument("--methods", nargs="+", default=METHODS, help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--tasks", type=positive, nargs="+", default=(2, 3), help="numbers of tasks (default: 2 3)")
    parser.add_argument("--max-memory", type=_size, nargs="+", default=(), metavar="SIZE", help="caps, as 8GB or 8GiB")
    parser.add_argument("--steps", type=positive, help="of nufilt's Adam (default: the method's own)")
    parser.add_argument("--model", choices=models.KINDS, default="llama", help="llama (default) or vit-b32")
    for name in SIZES:
        parser.add_argument(f"--{name}", type=positive, help="of the model (default: its own)")
    parser.add_argument("--dtype", choices=models.STORED, help="of the stored weights (default: the model's own)")
    parser.add_argument("--folder", type=Path, help="where to make the models, and keep them (default: nowhere)")
    parser.add_argument("--cold", action="store_true", help="empty the compile cache before each run")
    options = parser.parse_args()
    model, [version] = _model(parser, options), commands.versions(None)
    cases = _cases(options.methods, options.tasks, options.max_memory)
    with commands.working_folder(options.folder) as folder:
        models.write_models(folder, model, max(options.tasks))
        found = measure_all(cases, folder, version, options.steps, cold=options.cold)
    filled = "cold" if options.cold else f"warm: filled by a run of {FEWEST} tasks, of the same method and cap"
    how = {"compile cache": filled, "steps": options.steps or "the method's own"}
    records.finish(document(found, model, how), options.json or records.RESULTS / "memory.json")


if __name__ == "__main__":
    main()
