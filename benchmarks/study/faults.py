"""What storage, signals and strangers can do to a merge, counted: kills, disks that fail, hostile files.

Each harness is in `benchmarks.faults`, which the tests run small. A kill or a fault is survived if the merge ended with
at most one line, if under its name there was nothing or a whole model, and if the same command then gave the bits of an
undisturbed merge and did no step again that was on disk. A hostile file is handled if it was merged or refused in lines
of our own, in time and in little memory, with nothing written elsewhere and nothing executed. Disks of chosen sizes
need a user who may mount them; others are left out. The readers are fuzzed where atheris is installed, or what `make
fuzz` found at the same commit is taken in; else the results say so.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import measure, records, script
from benchmarks.faults import disks, fuzz, hostile, kills

TITLES = ("merges ended by signals and run again", "merges on disks that fail", "hostile files")
STRUCK = "what the signals struck"
REFUSED = "one refusal of each kind by a process of its own"
FUZZED = "readers under a coverage-guided fuzzer"  # only if they were
KILLS = ("signal", "tried", "survived", "of these while adding a task", "sent again, for no run was there")
PHASES = ("a merge was", "struck", "survived", "of these while adding a task")
DISKS = ("fault", "tried", "handled", "of these refused in one line")
FILES = ("file", "distinct", "handled", "of these refused", "of these in one line")
FILES += ("most seconds of a refusal", "most MB of a refusal")
PROCESSES = ("file", "command", "seconds by the clock", "MB")
READERS = ("reader", "executions", "without a finding", "places of the code reached", "seconds")
NOT_FUZZED = "not run: atheris is not installed"
ABOUT = {
    TITLES[
        0
    ]: "a signal counts if it ended a run that had begun the command; one that came sooner or later is sent again",
    TITLES[2]: "of a refusal in a process that holds everything imported: seconds of the processor, MB at the peak on "
    "top of what it held before; no two cases give the same bytes to the same command",
    REFUSED: "of the case above that took longest, by the clock and at the peak, with Python's start and all imports",
}
MEDIAN = "median"

Table = list[list[Any]]


def killed(root: Path, n_kills: int, seed: int) -> tuple[Table, Table, list[str]]:
    """Rows of the kills by signal and by what they struck, and what was wrong; in another process, which forks."""
    command = [sys.executable, "-m", "benchmarks.faults.kills", root, n_kills, seed]
    told: dict[str, Counter[str]] = {}
    struck = {phase: Counter[str]() for phase in kills.PHASES}
    findings: list[str] = []
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=records.ROOT) as process:
        for number, line in enumerate(process.stdout or (), 1):
            one = kills.Outcome(**json.loads(line))
            is_survived = not one.finding
            for count in (told.setdefault(one.kind, Counter()), struck.get(one.where, Counter())):
                count.update(tried=1, survived=int(is_survived), adding=int(is_survived and one.work == "add"))
            told[one.kind].update(missed=one.missed)
            findings += [] if is_survived else [f"{one.kind} {one.work} {one.where}: {one.finding}"]
            script.say(f"kill {number} of {n_kills}: {one.kind}, {one.work}, {one.where}")
    if process.returncode:
        raise SystemExit("the kills ended before their time")
    counts = ("tried", "survived", "adding")
    by_signal = [[kind, *(n[key] for key in (*counts, "missed"))] for kind, n in told.items()]
    return by_signal, [[phase, *(n[key] for key in counts)] for phase, n in struck.items()], findings


def failed(root: Path, every: int) -> tuple[Table, list[str]]:
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
    return re.sub(r"^a disk of [\d.]+", "a disk of so many", kind)


def attacked(root: Path, n_files: int, seed: int) -> tuple[Table, Table, list[str]]:
    """Rows of the hostile files and of refusals by processes of their own, and what was wrong."""
    told: dict[str, Counter[str]] = {}
    most: dict[str, list[float]] = {}
    longest: dict[str, tuple[float, hostile.Case]] = {}
    findings = []
    sandbox = hostile.Sandbox(root)
    for number, (case, outcome) in enumerate(hostile.study(sandbox, n_files, seed), 1):
        name, is_refused = case.target.name, outcome.status == 1
        count = told.setdefault(name, Counter())
        count.update(tried=1, handled=int(not outcome.finding), refused=int(is_refused))
        count.update(brief=int(is_refused and len(outcome.refusals) == 1))
        worst = most.setdefault(name, [0.0, 0.0])
        if is_refused:
            most[name] = [max(worst[0], outcome.seconds), max(worst[1], outcome.taken / 1e6)]
            if name not in longest or outcome.seconds > longest[name][0]:
                longest[name] = outcome.seconds, case
        findings += [f"{name}: {outcome.finding}"] if outcome.finding else []
        if number % 100 == 0:
            script.say(f"hostile file {number} of {n_files}")
    counts = ("tried", "handled", "refused", "brief")
    rows = [[name, *(n[key] for key in counts), *_rounded(*most[name])] for name, n in told.items()]
    processes = []
    for name, (_, case) in longest.items():
        seconds, taken = hostile.measured(sandbox, case)
        processes.append([name, case.command[0], *_rounded(seconds, taken / 1e6)])
        script.say(f"{name}: refused in {seconds:.1f} s by a process of its own")
    return rows, processes, findings


def _rounded(seconds: float, megabytes: float) -> list[Any]:
    return [round(seconds, 2), round(megabytes)]


def fuzzed(seconds: int, stored: Path | None) -> tuple[list[dict[str, Any]] | str, list[str]]:
    """What came of fuzzing each reader, or why it was not run; and what was wrong.

    Args:
      seconds: for each reader.
      stored: the file that `benchmarks.faults.fuzz` wrote; None to run it where it can be.

    Raises:
      ValueError: what is stored is of another commit.
    """
    if stored is None and not fuzz.is_installed():
        return NOT_FUZZED, []
    if stored is None:
        found = fuzz.study(seconds)
    else:
        document, here = json.loads(stored.read_text()), measure.checkout()
        if (then := {key: document.get(key) for key in here}) != here:
            raise ValueError(f"{stored} is of {_told(then)}, and this is {_told(here)}: fuzz again")
        found = document["fuzz"]
    return found, [f"{row['reader']}: {finding}" for row in found for finding in row["findings"]]


def _told(checkout: records.Json) -> str:
    return f"commit {checkout['commit']}" + (" with changes" if checkout["uncommitted_changes"] else "")


def fuzzed_rows(found: list[dict[str, Any]]) -> Table:
    """Rows of the readers."""
    rows = []
    for row in found:
        without = row["executions"] - row["failing"]
        rows.append([row["reader"], row["executions"], without, row["places"], row["seconds"]])
    return rows


def with_sum(rows: Iterable[list[Any]], n_counts: int) -> list[list[Any]]:
    """The rows and their sums; of what is no count, the most."""
    rows = list(rows)
    columns = list(zip(*rows, strict=True))[1:]
    return [*rows, ["all", *map(sum, columns[:n_counts]), *map(max, columns[n_counts:])]]


def with_median(rows: Table) -> Table:
    """The rows of refusals by processes, and what is usual."""
    if not rows:
        return rows
    seconds, megabytes = (statistics.median(row[at] for row in rows) for at in (2, 3))
    return [*rows, [MEDIAN, "", *_rounded(seconds, megabytes)]]


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
    try:
        fuzz_found, fuzz_findings = fuzzed(arguments.fuzz_seconds, arguments.fuzzed)
    except ValueError as error:
        parser.error(f"--fuzzed: {error}")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        by_signal, by_phase, kill_findings = killed(root / "kills", arguments.kills, arguments.seed)
        fallen, disk_findings = failed(root / "disks", arguments.every)
        files, processes, file_findings = attacked(root / "hostile", arguments.files, arguments.seed)
    tables = [
        records.table(TITLES[0], KILLS, with_sum(by_signal, 4)),
        records.table(STRUCK, PHASES, with_sum(by_phase, 3)),
        records.table(TITLES[1], DISKS, with_sum(fallen, 3)),
        records.table(TITLES[2], FILES, with_sum(files, 4)),
        records.table(REFUSED, PROCESSES, with_median(processes)),
    ]
    if not isinstance(fuzz_found, str):
        tables.append(records.table(FUZZED, READERS, with_sum(fuzzed_rows(fuzz_found), 4)))
    findings = [*kill_findings, *disk_findings, *file_findings, *fuzz_findings]
    document = {
        "benchmark": "faults",
        "environment": measure.environment("safetensors"),
        "settings": {key: value for key, value in script.settings(arguments).items() if not key.startswith("fuzz")},
        "about": ABOUT,
        "findings": findings,
        "fuzz": fuzz_found,
        "tables": tables,
    }
    records.finish(document, arguments.json or records.RESULTS / "faults.json")
    if findings:
        sys.exit(1)


if __name__ == "__main__":
    main()
