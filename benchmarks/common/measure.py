"""Times, rates and records that all benchmarks share.

python -m benchmarks.common.measure RESULTS.json ...    prints the Markdown tables of stored results
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from rich.console import Console

from nufilt_jax.errors import NufiltError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("jax", "jaxlib", "numpy", "torch")
MATMUL_SIZES = {"cpu": (512, 1024, 2048), "gpu": (2048, 4096, 8192)}
COPY_BYTES = {"cpu": 2**28, "gpu": 2**31}  # much more than any cache holds

Json = dict[str, Any]


class Times(NamedTuple):
    """Seconds of every repeat, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def minimum(self) -> float:
        """The fastest repeat."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)


class Neighbours:
    """How much of the machine's CPU time other processes take; above a few percent no time is to be trusted.

    Threads that wait for each other wait many times longer where a core is busy with something else.
    """

    def __init__(self) -> None:
        self._start = self._clocks()

    def percent(self) -> float | None:
        """Their share of all cores; None where the system does not tell."""
        if self._start is None or (now := self._clocks()) is None:
            return None
        wall, busy, own = (after - before for after, before in zip(now, self._start, strict=True))
        return max(0.0, 100 * (busy - own) / (wall * (os.cpu_count() or 1)))

    @staticmethod
    def _clocks() -> tuple[float, float, float] | None:
        """Seconds: by the wall, of all processes on all cores, of this process."""
        try:
            ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        idle, waiting = ticks[3:5]
        return time.perf_counter(), (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK"), time.process_time()


class Machine(NamedTuple):
    """What the machine reaches in float32: GFLOP/s of a square matrix product, GB/s read and written."""

    matmul: float
    copy: float


def time_it(call: Callable[[], Any], repeats: int, *, warm_up: bool = True) -> Times:
    """Times `call`, until its arrays are ready, after one call that does not count."""
    if warm_up:
        jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return Times(tuple(seconds))


def compile_it(function: Callable[..., Any], *args: Any, **static: Any) -> tuple[Callable[..., Any], float]:
    """Compiles a jitted function for these arguments.

    Returns:
      The compiled program, which takes `args` alone, and the seconds this took.
    """
    start = time.perf_counter()
    program = function.lower(*args, **static).compile()  # pyright: ignore[reportFunctionMemberAccess]
    return program, time.perf_counter() - start


def machine_rates(repeats: int = 5) -> Machine:
    """Measures what a plain matrix product and a plain pass over memory reach here."""
    kind = "cpu" if jax.default_backend() == "cpu" else "gpu"
    return Machine(matmul_rate(MATMUL_SIZES[kind], repeats), copy_rate(COPY_BYTES[kind], repeats))


def matmul_rate(sizes: Sequence[int], repeats: int) -> float:
    """GFLOP/s of n × n float32 products in full precision: the best of all sizes and repeats."""
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
    rates = []
    for n in sizes:
        a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.float32) for i in range(2))
        rates.append(2e-9 * n**3 / time_it(lambda a=a, b=b: product(a, b), repeats).minimum)
    return max(rates)


def copy_rate(n_bytes: int, repeats: int) -> float:
    """GB/s of one pass over a float32 array, read and written in place; both directions count."""
    negate = jax.jit(lambda x: -x, donate_argnums=0)
    holder = [jnp.ones(n_bytes // 4, jnp.float32)]

    def one_pass() -> jax.Array:
        holder[0] = negate(holder[0])
        return holder[0]

    return 2e-9 * n_bytes / time_it(one_pass, repeats).minimum


def environment(*packages: str) -> Json:
    """Where and with what a benchmark ran; `packages` are those that matter beside `PACKAGES`."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        # What benchmarks write is no change of the code.
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "platform": device.platform,
        "device": device.device_kind,
        "device_count": jax.device_count(),
        "cpu": _cpu_model(),
        "cpu_count": cores(),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in sorted((*PACKAGES, *packages))},
    }


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _git(*command: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(["git", *command], cwd=ROOT, check=True, capture_output=True, text=True)
        return done.stdout.strip()
    return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Json:
    """A table as the results files hold it."""
    return {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}


def rows(document: Json, title: str) -> list[Json]:
    """The rows of one of a document's tables, each by column."""
    [found] = [part for part in document["tables"] if part["title"] == title]
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


def write_json(document: Json, path: Path) -> None:
    """Writes results in a form that changes no more than the results do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def markdown(document: Json, only: str = "") -> str:
    """The tables of a results file whose titles begin so, and under them where the numbers come from."""
    at = document["environment"]
    commit = (at["commit"] or "unknown")[:8] + (" with changes" if at["uncommitted_changes"] else "")
    lines = [
        part for one in _titled(document, only) for part in ("**" + one["title"] + "**", "", markdown_table(one), "")
    ]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items() if version)
    lines.append(f"{where(at)}, Python {at['python']}, {versions}; commit {commit}, {at['date'][:10]}.")
    return "\n".join(lines)


def _titled(document: Json, start: str) -> list[Json]:
    return [one for one in document["tables"] if one["title"].startswith(start)]


def where(environment: Json) -> str:
    """The device in a few words."""
    if environment["platform"] != "cpu":
        return environment["device"]
    return f"{environment['cpu_count']} cores of {environment['cpu']}"


def markdown_table(one: Json) -> str:
    """One table in Markdown: numbers to four figures, and to the right."""
    numeric = [all(isinstance(row[i], int | float | None) for row in one["rows"]) for i in range(len(one["columns"]))]
    lines = [one["columns"], ["---:" if right else "---" for right in numeric]]
    lines += [[_cell(value) for value in row] for row in one["rows"]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if 0.99 < value < 1 - 1e-7:  # a share: what is missing is of interest
        return f"1 - {1 - value:.1e}"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e6 else f"{value:.1e}"


class Parser(argparse.ArgumentParser):
    """Arguments of a benchmark; what is wrong with them is said in one line."""

    def __init__(self, description: str | None, out: str) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--json", type=Path, metavar="OUT", help=f"results file (default: benchmarks/results/{out})")

    def error(self, message: str) -> NoReturn:
        """Says it and exits with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """What the package refuses is said, a line each, and ends the program with status 1."""
        try:
            yield
        except NufiltError as error:
            self.exit(1, "".join(f"{self.prog}: {problem}\n" for problem in error.problems))


def settings(options: argparse.Namespace) -> Json:
    """The options as the results file holds them: all but where it is written."""
    return {key: value for key, value in vars(options).items() if key != "json"}


def at_least(least: int) -> Callable[[str], int]:
    """Type of an argument: a whole number that is not below `least`."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return whole_number


def prepare_process() -> None:
    """Leaves the accelerator's memory to all contenders; before anything runs on it."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def finish(document: Json, path: Path) -> None:
    """Stores results and prints their tables."""
    write_json(document, path)
    Console(highlight=False).print(markdown(document), soft_wrap=True, markup=False)


def say(text: str) -> None:
    """Progress, on stderr and on a terminal alone."""
    Console(stderr=True, highlight=False, quiet=not sys.stderr.isatty()).print(text, markup=False, soft_wrap=True)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results files")
    paths = parser.parse_args().results
    if missing := [str(path) for path in paths if not path.is_file()]:
        parser.exit(1, f"{parser.prog}: there is no {', '.join(missing)}\n")
    for path in paths:
        Console(highlight=False).print(markdown(json.loads(path.read_text())), soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
