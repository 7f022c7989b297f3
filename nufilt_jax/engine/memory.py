"""How much memory a merge takes, and the windows that keep it under a cap: from shapes, before any work."""

import contextlib
import ctypes
import dataclasses
import gc
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from nufilt_jax.checkpoints.tensors import CHUNK
from nufilt_jax.config import MethodConfig, problem
from nufilt_jax.engine.grid import Stack, Window, restarted, smallest
from nufilt_jax.errors import ConfigError, Problem
from nufilt_jax.methods.stacked import total_rank
from nufilt_jax.output.facts import MemoryUse

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}iB": 2 ** (10 * power) for power, prefix in enumerate("KMGT", 1)}
# Digits are counted: with hundreds of them a number would be infinite as a float.
_SIZE = re.compile(r"(?P<number>\d{1,15}(\.\d{1,9})?)\s*(?P<unit>[A-Za-z]*)")

# Of Python, JAX and orbax, and of compilers at work, beside what is counted below: measured at 0.48 GB where the
# compile cache has all programs, and at 0.93 GB where it has none.
RUNTIME = 950 * 10**6
READERS = (
    4  # threads that look into files, each with two pieces and a tensor of the base; more only compete for the disk
)

_OF_DEVICE = 0.9  # of a device's memory may be taken: what is free lies in pieces


class Reach(NamedTuple):
    """What a method needs at a time.

    Attributes:
      states: arrays of the size of D that it keeps, D included.
      workspace: times the size of D that an update takes beside these, of the whole window.
      whole_model: whether it works on all layers at once, so that there can be one window only.
      on_device: bytes of the largest window that fits in the memory of the device, where that is another.
    """

    states: int = 1
    workspace: float = 0.0
    whole_model: bool = False
    on_device: float = math.inf


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a merge may take, and what it will take, in bytes.

    Attributes:
      allowed: by `--max-memory`, or half of what is free.
      is_asked_for: whether it was asked for.
      planned: the most at any time, resident, mapped pages included.
      read_ahead: whether the next cell's task vector is read while one is merged.
    """

    allowed: int
    is_asked_for: bool
    planned: int
    read_ahead: bool

    def told(self) -> MemoryUse:
        """For plan and recipe."""
        by = "--max-memory" if self.is_asked_for else "half of what is free"
        return MemoryUse(allowed=self.allowed, by=by, planned=self.planned)


def parse_size(text: str) -> int:
    """Bytes of a size as it is given: `8GB` is 8·10⁹, `8GiB` 8·2³⁰.

    Raises:
      ConfigError: it is no size.

    >>> parse_size("1.5GB"), parse_size("2 GiB"), parse_size("300000000")
    (1500000000, 2147483648, 300000000)
    """
    found = _SIZE.fullmatch(text.strip())
    units = {unit.upper(): size for unit, size in _UNITS.items()}
    if found is None or found["unit"].upper() not in units or float(found["number"]) == 0:
        raise ConfigError(problem("max_memory", f"must be a size as 8GB or 8GiB, got {text[:40]!r}"))
    return int(float(found["number"]) * units[found["unit"].upper()])


def free_memory() -> int:
    """Bytes that this machine could still give, or the container or batch job that this process is in."""
    free = _told_by("/proc/meminfo", "MemAvailable")
    # Where nobody tells what is free, half of all there is counts as that.
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if free is None else free
    return min([free, *left_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def left_in_groups(told: Path, mounted: Path) -> Iterator[int]:
    """Bytes that each limit on this process leaves it, of its own control group and of those around that.

    Args:
      told: names the process's groups.
      mounted: where they are folders; those of the first version in one below it for each resource.
    """
    with contextlib.suppress(OSError):  # another system, or none of it is shown here
        for line in told.read_text().splitlines():
            _, kinds, name = line.split(":", 2)
            if kinds not in ("", "memory"):
                continue
            root = mounted / kinds
            most, used = (
                (f"memory.{x}_in_bytes" for x in ("limit", "usage")) if kinds else ("memory.max", "memory.current")
            )
            place = root / name.lstrip("/")
            # Within a container its own group is the root, whatever its name outside.
            for folder in dict.fromkeys((root, *(x for x in (place, *place.parents) if x.is_relative_to(root)))):
                with contextlib.suppress(OSError, ValueError):  # `max` is no number, and no limit
                    limit, now = (int((folder / file).read_text()) for file in (most, used))
                    yield max(limit - now + _reclaimable(folder), 0)


def _reclaimable(group: Path) -> int:
    """Bytes of a control group's files in memory, which give way."""
    told = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    names = ("inactive_file", "active_file")
    return sum(int(told.get(f"total_{name}", told.get(name, 0))) for name in names)


def release_memory() -> None:
    """Gives memory that is not used any more back to the system.

    JAX lets go of host memory that was the device's too when garbage is collected, or else when a program runs next.
    What compilers and readers have freed the C library keeps for later, hundreds of MB of it, unless it is told.
    """
    gc.collect(0)
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_memory() -> int | None:
    """The most bytes that were resident in this process at any time; None where nobody tells."""
    return _told_by("/proc/self/status", "VmHWM")


def device_memory() -> int | None:
    """Bytes that a device of this process may give; None where it has no memory of its own."""
    try:
        device = jax.local_devices()[0]
    except (RuntimeError, AssertionError):  # a plan needs no backend, and a run has refused one that is not there
        return None
    return None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def largest_on_device(there: int, stacks: Iterable[Stack], config: MethodConfig, reach: Reach) -> float:
    """Bytes of the largest window whose D, τ, next τ and programs a device takes.

    Args:
      there: bytes that may be taken.
      stacks: those whose matrices programs work on.
      config: of the method.
      reach: what it keeps and needs.
    """
    # All layers of a stack are solved at once there.
    programs = [workspace(stack.shape, 1, config, stack.ranks) / stack.n_bytes for stack in stacks]
    return _OF_DEVICE * there / (reach.states + 2 + reach.workspace + max(programs, default=0.0))


def _told_by(path: str, key: str) -> int | None:
    """Bytes that a file of the system tells in kB; None where there is none, or it tells something else."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


def workspace(shape: tuple[int, ...], chunk: int, config: MethodConfig, factored: tuple[int, ...] | None = None) -> int:
    """Bytes that the program of a stack takes beside D and τ: it does not grow with the number of layers.

    Of a factored D, whose tasks have the ranks given, nothing of m n numbers is ever formed. About what the compiled
    programs' own `memory_analysis()` says; a test holds it between three quarters and twice.
    """
    if len(shape) != 2:
        return 0
    m, n = shape
    ranks = sum(getattr(config, name, 0) for name in ("filter_rank", "adapter_rank", "task_rank"))
    if factored is not None:
        return int(4 * chunk * (3 * total_rank(factored) * (m + n) + 9 * n * min(ranks, 2 * n) + m * ranks))
    # Of wide layers no Gram matrix is formed.
    numbers = 6.9 * m * n if 2 * m < n else 8.3 * m * n + 1.5 * n * n
    return int(4 * chunk * (numbers + 6 * n * min(ranks, 2 * n)))


class Sizes(NamedTuple):
    """What the memory of a merge depends on besides its windows, in bytes.

    Attributes:
      workspace: of the largest program.
      tensor: of the largest touched tensor, in float32.
      stored: of the largest tensor of any file, as it is stored.
      model: of the model in float32, if something runs it; else 0.
    """

    workspace: int
    tensor: int
    stored: int
    model: int

    def peak(self, window: int, n_windows: int, reach: Reach, *, read_ahead: bool) -> int:
        """The most that a merge takes whose largest window is `window` bytes."""
        vectors = 2 if read_ahead else 1
        walk = int((reach.states + vectors + reach.workspace) * window) + self.workspace + 2 * self.tensor
        # Written are θ0 + D tensor by tensor; of one window D is in memory still.
        write = (reach.states * window if n_windows == 1 else 0) + 4 * self.tensor
        inspect = READERS * (self.stored + 2 * CHUNK)
        return RUNTIME + max(walk, write, inspect) + 3 * self.model


def plan_windows(
    stacks: Sequence[Stack],
    sizes: Sizes,
    reach: Reach,
    cap: int | None,
    done: Callable[[str], int],
    first: int,
    *,
    n_tasks: int,
    free: int | None = None,
    at_least: int = 1,
) -> tuple[list[Window], Memory]:
    """The windows of a merge, as large as its memory allows.

    Args:
      stacks: all layers that the merge touches.
      sizes: what else takes memory.
      reach: what the method needs.
      cap: bytes allowed; None for half of what is free.
      done: gives the number of tasks that are merged into a layer.
      first: number of the first window.
      n_tasks: number of all tasks; a window that has them all is not worked on.
      free: bytes allowed where no cap is given; None for half of what is free.
      at_least: so many windows, if the method works in windows and there can be so many.

    Raises:
      ConfigError: not even the smallest windows fit, in memory or on the device; says how much would do.
    """
    given = free_memory() // 2 if free is None else free
    allowed = given if cap is None else cap
    whole = sum(stack.total for stack in stacks)
    least = whole if reach.whole_model else smallest(stacks)
    n_least = 1 if reach.whole_model or least == whole else 2  # 2 for any number above 1: no D is in memory at the end
    for read_ahead in (True, False):
        fits = sizes.peak(whole, 1, reach, read_ahead=read_ahead) <= allowed
        if fits or sizes.peak(least, n_least, reach, read_ahead=read_ahead) <= allowed:
            most = whole if fits else _most(allowed, sizes, reach, read_ahead=read_ahead)
            break
    else:
        needed = sizes.peak(least, n_least, reach, read_ahead=False)
        if cap is not None:
            raise ConfigError(_impossible(cap, needed, reach))
        most, read_ahead = least, False  # nobody asked for a cap: what there is may do
    if least > reach.on_device:
        raise ConfigError(_too_large(least, reach))
    most = whole if reach.whole_model else min(most, reach.on_device, math.ceil(whole / at_least))
    rows = restarted(stacks, done, most, first)
    largest = max((row.n_bytes for row in rows if row.done < n_tasks), default=0)

    def taken(*, read_ahead: bool) -> int:
        return sizes.peak(largest, len(rows), reach, read_ahead=read_ahead)

    if cap is not None and taken(read_ahead=read_ahead) > allowed:
        # What an earlier run has left of a stack may not divide as finely.
        read_ahead = False
        if (needed := taken(read_ahead=False)) > allowed:
            raise ConfigError(_impossible(cap, needed, reach))
    planned = taken(read_ahead=read_ahead)
    return rows, Memory(allowed, cap is not None, planned, read_ahead)


def _most(allowed: int, sizes: Sizes, reach: Reach, *, read_ahead: bool) -> int:
    """Bytes of the largest window that fits."""
    fixed = RUNTIME + sizes.workspace + 2 * sizes.tensor + 3 * sizes.model
    return int((allowed - fixed) / (reach.states + reach.workspace + (2 if read_ahead else 1)))


def _impossible(cap: int, needed: int, reach: Reach) -> Problem:
    least = math.ceil(needed / 1e6)  # up: this very cap, given again, has to do
    why = "with all layers together, as this method needs" if reach.whole_model else "layer by layer"
    what = f"{cap / 1e9:.2f} GB are too little: {why} this merge takes {least / 1e3:.3f} GB"
    return problem("max_memory", what, f"at least --max-memory {least}MB")


def _too_large(least: int, reach: Reach) -> Problem:
    what = "all layers together, as this method needs them" if reach.whole_model else "the smallest windows"
    told = f"its memory takes {reach.on_device / 1e9:.2f} GB of D at a time, and {what} have {least / 1e9:.2f} GB"
    return Problem("device", told, "take another device, or JAX_PLATFORMS=cpu")
