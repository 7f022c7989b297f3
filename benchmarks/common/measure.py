"""Times and rates, and where they were taken."""

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.common import records, script
from benchmarks.common.records import ROOT, Json

GIB = 2**30
PACKAGES = ("jax", "jaxlib", "numpy", "torch")
MATMUL_SIZES = {"cpu": (512, 1024, 2048), "gpu": (2048, 4096, 8192)}
COPY_BYTES = {"cpu": 2**28, "gpu": 2**31}  # much more than any cache holds


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
        **checkout(),
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


def finish(found: Json, options: argparse.Namespace, name: str) -> None:
    """Stores what a script found, with where and by which options, under its name and the platform's, and prints it."""
    document = {"environment": environment(), "settings": script.settings(options), **found}
    records.finish(document, options.json or records.RESULTS / f"{name}_{jax.default_backend()}.json")


def checkout() -> Json:
    """The commit that is checked out, None outside of git, and whether anything was changed since."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        # What benchmarks write is no change of the code.
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
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
