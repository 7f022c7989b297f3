"""Everything worth knowing of an accelerator, in one run: `python -m benchmarks.speed.accelerator --all`.

Stage after stage in processes of their own: one task's solve beside PyTorch on the same card, Table 5's rows,
decompositions, products by algorithm, alone and within a solve, and the tests of the mathematics on the device. Results
are written after each stage. What fails, or does not fit in the time that is left, is told by name, in the results too,
and ends the script with status 1.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import records, script

TESTS = "tests"
TITLE = "Stages"
COLUMNS = ("stage", "seconds", "outcome")
_SPEED = "benchmarks.speed."
_TORCH = ("--against", "torch", "torch-batched")
STAGES: dict[str, tuple[str, ...]] = {
    "solve vit-b32": (_SPEED + "solve", "--model", "vit-b32", "--tasks", "8", "--skip-plain", *_TORCH),
    "solve vit-l14": (_SPEED + "solve", "--model", "vit-l14", "--skip-plain"),
    "solve 7B block": (_SPEED + "solve", "--model", "llava-1.5-7b", "--layers", "1", "--skip-plain"),
    "Table 5": (_SPEED + "steps",),
    "products": (_SPEED + "products",),
    "small decompositions": (_SPEED + "small_decompositions",),
    "precision": (_SPEED + "precision",),
    "decompositions": (_SPEED + "decompositions", "--n", "768", "1024", "4096", "--repeats", "3", "--budget", "30"),
    # Last: what is timed must not wait for them.
    TESTS: ("pytest", "--quiet", "-p", "no:cacheprovider", "--numprocesses", "8", "tests/core", "tests/linalg"),
}
MODEST = ("solve vit-b32", "products", "small decompositions", TESTS)


class Done(NamedTuple):
    """A stage that was tried.

    Attributes:
      seconds: by the wall; None if it did not start.
      outcome: `passed`, or what was wrong.
      document: its results, if it has any.
    """

    seconds: float | None
    outcome: str
    document: records.Json | None = None


def run_stage(name: str, command: Sequence[str], limit: float) -> Done:
    """One stage, stopped at its limit in seconds."""
    if limit <= 0:
        return Done(None, "not run: no time was left")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        told = () if name == TESTS else ("--json", str(out))
        start = time.perf_counter()
        try:
            process = subprocess.run(
                [sys.executable, "-m", *command, *told],
                cwd=records.ROOT,
                env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # tests share the device
                capture_output=True,
                text=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return Done(time.perf_counter() - start, f"stopped after {limit:.0f} s")
        seconds = time.perf_counter() - start
        said = (process.stderr.strip() or process.stdout.strip()).splitlines() or ["nothing said"]
        if process.returncode:
            return Done(seconds, f"status {process.returncode}: {said[-1]}")
        if name == TESTS:
            return Done(seconds, f"passed: {process.stdout.strip().splitlines()[-1]}")
        return Done(seconds, "passed", json.loads(out.read_text()))


def collected(found: Mapping[str, Done]) -> records.Json:
    """One results file of all stages."""
    documents = {name: done.document for name, done in found.items() if done.document is not None}
    tables = [records.table(TITLE, COLUMNS, [[name, done.seconds, done.outcome] for name, done in found.items()])]
    for name, document in documents.items():
        tables += [{**table, "title": f"{name}: {table['title']}"} for table in document["tables"]]
    environment = next((document["environment"] for document in documents.values()), None)
    return {"environment": environment or _environment(), "stages": documents, "tables": tables}


def _environment() -> records.Json:
    # Not before: whoever asks for the devices takes their memory from the stages.
    from benchmarks.common import measure

    return measure.environment()


def main() -> None:
    """Parses the command line and runs."""
    parser = script.Parser(__doc__, "accelerator_PLATFORM.json")
    which: Any = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help=f"every stage (default: {', '.join(MODEST)})")
    which.add_argument("--stages", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--budget", type=script.at_least(1), default=570, help="most seconds in all (default: 570)")
    options = parser.parse_args()
    names = options.stages or (tuple(STAGES) if options.all else MODEST)
    ends, found = time.monotonic() + options.budget, {}
    for name in names:
        script.say(name)
        found[name] = run_stage(name, STAGES[name], ends - time.monotonic())
        if options.json:
            records.write_json(collected(found), options.json)
    document = collected(found)
    platform = document["environment"]["platform"]
    records.finish(document, options.json or records.RESULTS / f"accelerator_{platform}.json")
    if missing := [f"{name}: {done.outcome}" for name, done in found.items() if not done.outcome.startswith("passed")]:
        parser.exit(1, "".join(f"{parser.prog}: {line}\n" for line in missing))


if __name__ == "__main__":
    main()
