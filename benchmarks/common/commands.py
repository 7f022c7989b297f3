"""The package's commands in processes of their own, of this version and another, and what their plans had said."""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.common import launch, models
from benchmarks.common.records import ROOT, Json

MERGE = ("-m", "nufilt_jax.merge")
PARTS = ("files", "merging", "compiling")  # of a plan's seconds
ESTIMATED = (
    *(f"{part} s {how}" for part in PARTS for how in ("planned", "measured")),
    "files and merging, planned / measured",
)
_UNSET = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")  # the command's own shall count


class FailedError(SystemExit):
    """A command ended with another status than it should.

    Attributes:
      status: with which it ended.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Version(NamedTuple):
    """A version of the package.

    Attributes:
      name: its commit.
      root: its checkout.
    """

    name: str
    root: Path


class Run(NamedTuple):
    """One command, from the start of its process to the end.

    Attributes:
      wall: seconds.
      processor: seconds of all its threads, the system's part included.
      peak: largest resident memory in bytes.
      told: what it wrote on stdout.
    """

    wall: float
    processor: float
    peak: int
    told: str

    @property
    def document(self) -> Json:
        """What it wrote, read as JSON."""
        return json.loads(self.told)


def versions(before: Path | None) -> list[Version]:
    """Another version, if there is one, and this one, named by their commits, or by `before` and `now`."""
    roots = {"now": ROOT} if before is None else {"before": before.absolute(), "now": ROOT}
    commits = {role: _commit(root) or role for role, root in roots.items()}
    distinct = len(set(commits.values())) == len(roots)
    return [Version(commits[role] if distinct else role, root) for role, root in roots.items()]


def _commit(root: Path) -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None


def checkout(text: str) -> Path:
    """Type of an argument: a folder with a version of the package."""
    if not Path(text, "nufilt_jax", "merge.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} holds no checkout of nufilt_jax")
    return Path(text)


def add_before(parser: argparse.ArgumentParser) -> None:
    """The options of scripts that compare two versions."""
    parser.add_argument("--before", type=checkout, metavar="PATH", help="also run another version, a checkout of it")


@contextlib.contextmanager
def working_folder(kept: Path | None) -> Iterator[Path]:
    """An absolute path: the folder that was asked for, or one that does not stay."""
    with tempfile.TemporaryDirectory() as passing:
        yield Path(passing) if kept is None else kept.absolute()


def run(
    arguments: Sequence[str | Path],
    version: Version,
    cache: Path,
    *,
    status: int = 0,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Run:
    """Runs Python with these arguments and measures it.

    Args:
      arguments: with absolute paths.
      version: of the package that is imported.
      cache: folder of what the package keeps between runs.
      status: with which it should end.
      variables: of its environment, beside those of this process.

    Raises:
      FailedError: it ends with another.
    """
    command = [sys.executable, *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key not in _UNSET}
    path = os.pathsep.join(filter(None, (str(version.root), os.environ.get("PYTHONPATH"))))
    environment |= {"NUFILT_CACHE": str(cache), "PYTHONPATH": path, **variables}
    with tempfile.NamedTemporaryFile("r") as report:
        # The working folder comes before PYTHONPATH.
        launched = [sys.executable, "-I", "-S", launch.__file__, report.name, *command]
        done = subprocess.run(launched, check=True, cwd=version.root, env=environment, capture_output=True, text=True)
        took = json.load(report)
    if (found := took.pop("status")) != status:
        what = f"{version.name}: {' '.join(command[1:])} ended with status {found}"
        raise FailedError(found, f"{what}: {done.stderr}")
    return Run(**took, told=done.stdout)


def run_module(name: str, *options: str, given: Json | list[Any]) -> Run:
    """Runs a module of this version in a process of its own; what it is given comes last, as JSON."""
    [version] = versions(None)
    with tempfile.TemporaryDirectory() as cache:
        return run(["-m", name, *options, json.dumps(given)], version, Path(cache))


def cache_of(folder: Path, version: Version) -> Path:
    """Where a version keeps what it keeps between runs."""
    return folder / f"cache-{version.name}"


def empty_compile_cache(folder: Path, version: Version) -> None:
    """Forgets the programs that a version has compiled."""
    shutil.rmtree(cache_of(folder, version) / "xla", ignore_errors=True)


def sources(folder: Path, n_tasks: int) -> list[str | Path]:
    """Arguments that name a folder's base and its first tasks."""
    base, *tasks = models.names(n_tasks)
    return ["--base", folder / base, *(part for name in tasks for part in ("--task", f"{name}={folder / name}"))]


def merge(
    folder: Path,
    options: Sequence[str | Path],
    version: Version,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Run:
    """Merges, and removes the merged model again; caches and output are in the folder."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [*MERGE, *options, "--out", out, "--json"]
    found = run(command, version, cache_of(folder, version), variables=variables)
    shutil.rmtree(out)
    return found


def plan(folder: Path, options: Sequence[str | Path], version: Version) -> Json:
    """What `--plan` says of the same merge."""
    arguments = [*MERGE, *options, "--out", folder / "out", "--plan", "--json"]
    return run(arguments, version, cache_of(folder, version)).document


def least(runs: Iterable[Run]) -> Run:
    """The fastest by the wall."""
    return min(runs, key=lambda one: one.wall)


def alternating(versions: Sequence[Version], repeat: int, call: Callable[[Version], Any]) -> dict[str, list[Any]]:
    """What a call gives for each version in turn, so many times; by the version's name."""
    found: dict[str, list[Any]] = {version.name: [] for version in versions}
    for _ in range(repeat):
        for version in versions:
            found[version.name].append(call(version))
    return found


def compiled(run: Run, key: str) -> float:
    """Of the programs that a merge compiled; 0 where its version does not tell."""
    return run.document.get("compiled", {}).get(key, 0)


def compiled_anew(run: Run) -> float:
    """Programs that were not in the compile cache."""
    return compiled(run, "programs") - compiled(run, "from_cache")


def compile_seconds(run: Run) -> float:
    """Seconds that the solves waited for the compiler; what it does meanwhile, in the background, is not in them.

    Of a version that does not tell them by steps: all, since it compiled nothing in the background.
    """
    told = [step["timings"]["compile"] for step in run.document["steps"] if "compile" in step.get("timings", {})]
    return sum(told) if told else compiled(run, "seconds")


def solve_seconds(run: Run) -> float:
    """Seconds of all solves, without compilation."""
    return sum(step.get("timings", {}).get("solve", 0.0) for step in run.document["steps"]) - compile_seconds(run)


def estimate_cells(plan: Json, run: Run) -> list[float | None]:
    """The plan's seconds beside the run's, as `ESTIMATED` names them: all that is not solved belongs to files."""
    merging, compiling = solve_seconds(run), compile_seconds(run)
    measured = dict(zip(PARTS, (run.wall - merging - compiling, merging, compiling), strict=True))
    planned = plan.get("seconds", {})
    cells = [x for part in PARTS for x in (planned.get(part), measured[part])]
    told = [planned.get(part) for part in PARTS[:2]]
    return [*cells, None if None in told else sum(told) / (measured["files"] + merging)]
