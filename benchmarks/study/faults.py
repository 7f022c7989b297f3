"""What storage, signals and strangers can do to a merge, counted: kills, disks that fail, hostile files.

Each harness is in `benchmarks.faults`, which the tests run small. A kill or a fault is survived if the merge ended with
at most one line, if under its name there was nothing or a whole model, and if the same command then gave the bits of an
undisturbed merge. A hostile file is handled if it was merged or refused in lines of our own, in time and in little
memory, with nothing written elsewhere. Disks of chosen sizes need a user who may mount them; others are left out. The
readers are fuzzed where atheris is installed, or what `make fuzz` found is taken in; else the results say so.
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import measure, records, script
from benchmarks.faults import disks, fuzz, hostile

TITLES = ("merges ended by signals and run again", "merges on disks that fail", "hostile files")
FUZZED = "readers under a coverage-guided fuzzer"  # only if they were
KILLS = ("signal", "tried", "survived", "struck while merging", "of these while adding a task")
DISKS = ("fault", "tried", "handled", "of these refused in one line")
FILES = ("file", "tried", "handled", "of these refused", "most seconds of a refusal", "most MB of a refusal")
READERS = ("reader", "executions", "without a finding", "places of the code reached", "seconds")
NOT_FUZZED = "not run: atheris is not installed"


def killed(root: Path, n_kills: int, seed: int) -> tuple[list[list[Any]], list[str]]:
    """Rows of the kills, and what was wrong; in another process, which forks."""
    command = [sys.executable, "-m", "benchmarks.faults.kills", root, n_kills, seed]
    told: dict[str, Counter[str]] = {}
    findings: list[str] = []
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=records.ROOT) as process:
        for number, line in enumerate(process.stdout or (), 1):
            one = json.loads(line)
            count = told.setdefault(one["kind"], Counter())
            count.update(tried=1, survived=int(not one["finding"]), struck=int(bool(one["where"])))
            count["adding"] += int(bool(one["where"]) and one["work"] == "add")
            findings += [f"{one['kind']} {one['work']} {one['where']}: {one['finding']}"] if one["finding"] else []
            script.say(f"kill {number} of {n_kills}: {one['kind']}, {one['work']}, {one['where'] or 'it was over'}")
    if process.returncode:
        raise SystemExit("the kills ended before their time")
    return [
        [kind, *(n[key] for key in ("tried", "survived", "struck", "adding"))] for kind, n in told.items()
    ], findings


def failed(root: Path, every: int) -> tuple[list[list[Any]], list[str]]:
    """Rows of the disks, and what was wrong."""
    told: dict[str, Counter[str]] = {}
    findings = []
    for kind, outcome in disks.study(root, every):
        count = told.setdefault(_disk_row(kind), Counter())
        is_handled = not outcome.finding
        count.update(tried=1, handled=int(is_handled), refused=int(outcome.struck and is_handled))
        findings += [f"{kind}: {outcome.finding}"] if outcome.finding else []
        script.say(f"{kind}: {outcome.finding or outcome.line or 'merged'}")
    return [[kind, *(n[key] for key in ("tried", "handled", "refused"))] for kind, n in told.items()], findings


def _disk_row(kind: str) -> str:
    if not kind.startswith("a disk of"):
        return kind
    return "a disk of so many inodes" if kind.endswith("inodes") else "a disk of so many models"


def attacked(root: Path, n_files: int, seed: int) -> tuple[list[list[Any]], list[str]]:
    """Rows of the hostile files, and what was wrong."""
    told: dict[str, Counter[str]] = {}
    worst: dict[str, list[float]] = {}
    findings = []
    for number, (target, outcome) in enumerate(hostile.study(root, n_files, seed), 1):
        count = told.setdefault(target.name, Counter())
        count.update(tried=1, handled=int(not outcome.finding), refused=int(outcome.status == 1))
        most = worst.setdefault(target.name, [0.0, 0.0])
        if outcome.status == 1:
            worst[target.name] = [max(most[0], outcome.seconds), max(most[1], outcome.taken / 1e6)]
        findings += [f"{target.name}: {outcome.finding}"] if outcome.finding else []
        if number % 100 == 0:
            script.say(f"hostile file {number} of {n_files}")
    rows = [
        [name, *(n[key] for key in ("tried", "handled", "refused")), round(worst[name][0], 2), round(worst[name][1])]
        for name, n in told.items()
    ]
    return rows, findings


def fuzzed(seconds: int, stored: Path | None) -> tuple[list[dict[str, Any]] | str, list[str]]:
    """What came of fuzzing each reader, or why it was not run; and what was wrong.

    Args:
      seconds: for each reader.
      stored: the file that `benchmarks.faults.fuzz` wrote; None to run it where it can be.
    """
    if stored is None and not fuzz.is_installed():
        return NOT_FUZZED, []
    found = fuzz.study(seconds) if stored is None else json.loads(stored.read_text())["fuzz"]
    return found, [f"{row['reader']}: {finding}" for row in found for finding in row["findings"]]


def fuzzed_rows(found: list[dict[str, Any]]) -> list[list[Any]]:
    """Rows of the readers."""
    rows = []
    for row in found:
        without = row["executions"] - len(row["findings"])
        rows.append([row["reader"], row["executions"], without, row["places"], row["seconds"]])
    return rows


def with_sum(rows: Iterable[list[Any]], n_counts: int) -> list[list[Any]]:
    """The rows and their sums; of what is no count, the most."""
    rows = list(rows)
    columns = list(zip(*rows, strict=True))[1:]
    return [*rows, ["all", *map(sum, columns[:n_counts]), *map(max, columns[n_counts:])]]


def main() -> None:
    """Parses the command line, and exits with status 1 if anything was not survived or handled."""
    parser = script.Parser(__doc__, "faults.json")
    parser.add_argument("--kills", type=script.at_least(4), default=200, help="(default: 200)")
    parser.add_argument("--every", type=script.at_least(1), default=1, help="n-th fault of a disk (default: 1)")
    parser.add_argument("--files", type=script.at_least(1), default=2000, help="hostile ones (default: 2000)")
    parser.add_argument("--fuzz-seconds", type=script.at_least(1), default=200, help="of each reader (default: 200)")
    parser.add_argument("--fuzzed", type=Path, metavar="FILE", help="what make fuzz wrote, instead of fuzzing here")
    parser.add_argument("--seed", type=int, default=0, help="of instants and damage (default: 0)")
    arguments = parser.parse_args()
    fuzz_found, fuzz_findings = fuzzed(arguments.fuzz_seconds, arguments.fuzzed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        rows = [killed(root / "kills", arguments.kills, arguments.seed), failed(root / "disks", arguments.every)]
        rows.append(attacked(root / "hostile", arguments.files, arguments.seed))
    parts = zip(TITLES, (KILLS, DISKS, FILES), rows, (4, 3, 3), strict=True)
    tables = [records.table(title, columns, with_sum(found, n)) for title, columns, (found, _), n in parts]
    if not isinstance(fuzz_found, str):
        tables.append(records.table(FUZZED, READERS, with_sum(fuzzed_rows(fuzz_found), 4)))
    findings = [finding for _, found in rows for finding in found] + fuzz_findings
    document = {
        "benchmark": "faults",
        "environment": measure.environment("safetensors"),
        "settings": {key: value for key, value in script.settings(arguments).items() if not key.startswith("fuzz")},
        "findings": findings,
        "fuzz": fuzz_found,
        "tables": tables,
    }
    records.finish(document, arguments.json or records.RESULTS / "faults.json")
    if findings:
        sys.exit(1)


if __name__ == "__main__":
    main()
