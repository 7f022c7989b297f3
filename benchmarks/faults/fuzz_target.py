"""Fuzzes one reader in this process, for `benchmarks.faults.fuzz`.

python -m benchmarks.faults.fuzz_target READER WORK [options of libFuzzer] [corpora]

What a reader raises is kept in `WORK/found`, once for each place that raises it, each time is counted, and fuzzing goes
on.
"""

import functools
import hashlib
import importlib
import json
import os
import random
import resource
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

atheris: Any = importlib.import_module("atheris")  # an extra, which type checkers do not see
with atheris.instrument_imports(include=["nufilt_jax"], enable_loader_override=False):
    from benchmarks.faults import mutations, readers

FOUND = "found"
MOST_BYTES = 500_000_000  # that inputs may take on top of what the first did


class Trial:
    """What libFuzzer calls with every input."""

    def __init__(self, reader: readers.Reader, work: Path) -> None:
        self._reader, self._found, self._failing = reader, work / FOUND, work / readers.FAILING
        self._places: set[str] = set()
        self._first = 0  # bytes at the peak

    def __call__(self, data: bytes) -> None:
        """Reads an input, and keeps it if that fails in a new place."""
        try:
            self._reader.read(data)
            self._require_little_memory()
        except Exception as error:
            with self._failing.open("ab") as file:
                file.write(b".")
            frames = traceback.extract_tb(error.__traceback__)
            place = next((f"{f.filename}:{f.lineno}" for f in reversed(frames) if "nufilt_jax" in f.filename), "")
            if (kind := f"{type(error).__name__} at {place}") not in self._places:
                self._places.add(kind)
                name = f"finding-{hashlib.sha256(data).hexdigest()[:16]}"
                (self._found / name).write_bytes(data)
                (self._found / f"{name}.txt").write_text("".join(traceback.format_exception(error)), errors="replace")

    def _require_little_memory(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._first = self._first or peak
        if (taken := peak - self._first) > MOST_BYTES:
            self._first = peak  # a peak stays: what comes after is compared with it
            raise MemoryError(f"the inputs so far took {taken / 1e6:.0f} MB")


def mutated(name: str, data: bytes, most: int, seed: int) -> bytes:
    """An input changed: its bytes as libFuzzer does, or the JSON in it; of safetensors with the length that it has."""
    rng = random.Random(seed)
    if name != "msgpack" and rng.random() < 0.4 and (damaged := _damaged(name, data, rng)) and len(damaged) <= most:
        return damaged
    data = bytes(atheris.Mutate(data, most))
    end = data.rfind(b"}") + 1
    if name == "safetensors" and end > 8 and rng.random() < 0.7:
        return (end - 8).to_bytes(8, "little") + data[8:]
    return data


def _damaged(name: str, data: bytes, rng: random.Random) -> bytes:
    try:
        if name == "safetensors":
            return mutations.damaged_safetensors(data, rng)
        return mutations.damaged_object(json.loads(data), rng)
    except (ValueError, RecursionError):
        return b""


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def main() -> None:
    """Never returns: libFuzzer ends the process."""
    name, work, *options = sys.argv[1:]
    target = readers.TARGETS[name]
    words = Path(work, "words")
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
    trial = Trial(readers.Reader(target, Path(work, f"model-{os.getpid()}")), Path(work))
    change = functools.partial(mutated, name)
    # libFuzzer starts itself again, by a shell, for processes that may die of an input.
    again = shlex.join([sys.executable, "-m", "benchmarks.faults.fuzz_target", name, work])
    atheris.Setup([again, f"-dict={words}", *options], trial, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
