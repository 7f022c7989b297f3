"""Kills merges at many instants by SIGKILL, runs the same command again, and compares every bit.

The base and four fine-tunes are built-in checkpoints, merged in three windows (see `in_windows`): by rows, window after
window, and by columns, task after task, which is what `--evaluate` makes of a merge. The instants are spread evenly
over the time that an undisturbed run takes, from the start of its process to the end; where a run is over before its
instant, another is killed a little sooner. After a kill there must be nothing under the output's name, or the whole
model; after the second run the model, the state, the forecast and the scores must be those of an undisturbed merge in
one window, and nothing may lie beside them.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import measure, records, script
from nufilt_jax.checkpoints import open_checkpoint
from nufilt_jax.errors import NufiltError
from nufilt_jax.output.place import FORECAST, RECIPE, STATE, OutputPlace
from nufilt_jax.output.state import stored_windows
from nufilt_jax.output.stored import Stored
from nufilt_jax.zoo import materialise

TASKS = ("orientation", "letters", "shapes", "frequency")  # those that need no other package
WALKS = {"rows": (), "columns": ("--evaluate", "--limit", "50")}
WINDOWS, IN_THREE, IN_ONE = 3, 270_000, 1 << 40  # and bytes of a window that make three of the model, or one
SOONER = 0.95  # times as late is a merge killed anew that was over before it was killed
LIMIT = 60.0  # seconds of work that may be repeated
TITLE = "merges killed and run again"
PHASES = ("before the first cell", "in a cell", "between cells", "after the last cell")
OVER = "when it was over"
COLUMNS = (
    "walk",
    "kills",
    *PHASES,
    "whole model under its name",
    "identical",
    "most seconds repeated",
    "wanted at most",
)
COLUMNS += ("seconds undisturbed", "of these in cells", "seconds lost with the second start, median", "most")

Event = dict[str, Any]


class Run(NamedTuple):
    """One process: how it ended, its seconds, and what it told of its cells."""

    status: int
    wall: float
    events: list[Event]


class Study:
    """Models in a folder, and merges of them by one walk."""

    def __init__(self, folder: Path, walk: str, options: Iterable[str]) -> None:
        zoo = materialise(folder / "models")
        tasks = [part for name in TASKS for part in ("--task", f"{name}={zoo.tasks[name]}")]
        self._argv = ["merge", "--base", zoo.base, *tasks, "--quiet", *WALKS[walk], *options]
        self._folder = folder

    def merge(self, out: Path, most_bytes: int, kill_after: float | None = None) -> Run:
        """Runs the command, and kills it so many seconds after it was started unless it has ended."""
        events, problems = self._folder / "events", self._folder / "problems"
        events.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.study.in_windows", most_bytes, events, *self._argv, "--out", out]
        environment = os.environ | {"PYTHONPATH": str(records.ROOT), "HF_HUB_OFFLINE": "1"}
        environment["NUFILT_CACHE"] = str(self._folder / "cache")
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        with problems.open("w") as stderr:
            start = time.monotonic()
            process = subprocess.Popen(list(map(str, command)), stdout=stderr, stderr=stderr, env=environment)
            try:
                process.wait(kill_after)
            except subprocess.TimeoutExpired:
                process.kill()
            status, wall = process.wait(), time.monotonic() - start
        if status > 0:
            sys.stderr.write(problems.read_text())
        lines = events.read_text().splitlines() if events.exists() else []
        return Run(status, wall, [{**json.loads(line), "ended": start + wall} for line in lines])

    def undisturbed(self, most_bytes: int, n_windows: int) -> tuple[dict[str, Any], Run]:
        """What a merge gives, and how it went.

        Raises:
          SystemExit: it fails, or has another number of windows.
        """
        out = self._folder / "undisturbed"
        run = self.merge(out, most_bytes)
        if run.status:
            raise SystemExit(f"the command ended with status {run.status}")
        found = json.loads((out / RECIPE).read_text())["windows"]
        if len(found) != n_windows:
            raise SystemExit(f"the merge has {len(found)} windows where {n_windows} are wanted")
        result = content(out)
        shutil.rmtree(out)
        return result, run

    def killed(self, at: float, wanted: dict[str, Any], undisturbed: float) -> records.Json:
        """One merge that is killed after `at` seconds and run again: what came of it."""
        out = self._folder / "out"
        first = self.merge(out, IN_THREE, at)
        stands = out.exists()
        differences = [f"under its name: {name}" for name in different(out, wanted)] if stands else []
        second = self.merge(out, IN_THREE)
        if second.status or first.status > 0:
            differences.append(f"the runs ended with status {first.status} and {second.status}")
        differences += different(out, wanted)
        place = OutputPlace(out)
        differences += [path.name for path in place.out.parent.glob(f"{out.name}.*")]
        for path in place.out.parent.glob(f"{out.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return {
            "seconds": round(at, 3),
            "phase": phase(first),
            "kept": WINDOWS * len(TASKS) - sum(event["what"] == "begin" for event in second.events),
            "stands": stands,
            "repeated": round(repeated(first.events, second.events), 3),
            "lost": round(first.wall + second.wall - undisturbed, 3),
            "differences": differences,
        }


def content(folder: Path) -> dict[str, Any]:
    """All that two merges have in common if they are the same: each tensor of model and state, and what is told."""
    with Stored(stored_windows(folder / STATE)) as stored:
        state = {"delta": stored.deltas(stored.layers), **stored.others(stored.layers)}
        groups = {"model": open_checkpoint(str(folder), role="base").read(), **state}
        found: dict[str, Any] = {layer: stored.done(layer) for layer in stored.layers}
    for group, tensors in groups.items():
        arrays = {name: np.asarray(x) for name, x in tensors.items()}
        found |= {f"{group} {name}": (x.dtype, x.shape, x.tobytes()) for name, x in arrays.items()}
    recipe = json.loads((folder / RECIPE).read_text())
    scores = [(step["task"], step.get("accuracy")) for step in recipe["steps"]]
    return found | {FORECAST: (folder / FORECAST).read_bytes(), "scores": scores, "tasks": recipe["tasks"]}


def different(folder: Path, wanted: dict[str, Any]) -> list[str]:
    """Names of what differs from an undisturbed merge."""
    if not folder.exists():
        return ["there is no model"]
    try:
        found = content(folder)
    except (NufiltError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return ["it cannot be read"]
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def phase(run: Run) -> str:
    """Where a run was when it was killed."""
    if run.status == 0:
        return OVER
    if not run.events:
        return PHASES[0]
    if run.events[-1]["what"] == "begin":
        return PHASES[1]
    return PHASES[2 if sum(event["what"] == "end" for event in run.events) < WINDOWS * len(TASKS) else 3]


def repeated(first: list[Event], second: list[Event]) -> float:
    """Seconds that the first run spent in cells of which the second merges a layer once more."""
    again = {(layer, event["task"]) for event in second for layer in event["layers"]}
    seconds = 0.0
    for event, following in zip(first, [*first, None][1:], strict=True):
        if event["what"] == "begin" and any((layer, event["task"]) in again for layer in event["layers"]):
            seconds += (following["at"] if following else event["ended"]) - event["at"]
    return seconds


def row(walk: str, kills: list[records.Json], undisturbed: Run) -> list[Any]:
    """The walk's row of the table."""
    phases = [sum(one["phase"] == name for one in kills) for name in PHASES]
    stands, identical = sum(one["stands"] for one in kills), sum(not one["differences"] for one in kills)
    worst, lost = max(one["repeated"] for one in kills), [one["lost"] for one in kills]
    in_cells = repeated(undisturbed.events, undisturbed.events)
    parts = [stands, identical, worst, LIMIT, undisturbed.wall, in_cells, statistics.median(lost), max(lost)]
    return [walk, len(kills), *phases, *parts]


def study(walk: str, n_kills: int, options: Iterable[str]) -> tuple[list[records.Json], Run]:
    """All kills of one walk, and an undisturbed run in three windows with a warm compile cache."""
    with tempfile.TemporaryDirectory() as name:
        merges = Study(Path(name), walk, options)
        script.say(f"by {walk}: undisturbed")
        wanted, _ = merges.undisturbed(IN_ONE, 1)
        merges.undisturbed(IN_THREE, WINDOWS)  # fills the compile cache
        found, run = merges.undisturbed(IN_THREE, WINDOWS)
        if found != wanted:
            raise SystemExit("three windows give another model than one")
        kills = []
        for number in range(n_kills):
            at = run.wall * (number + 0.5) / n_kills
            while (one := merges.killed(at, wanted, run.wall))["phase"] == OVER and not one["differences"]:
                at *= SOONER
            kills.append(one)
            verdict = f"differs: {', '.join(one['differences'])}" if one["differences"] else "identical"
            script.say(f"by {walk}, {number + 1} of {n_kills}: killed after {at:.2f} s, {one['phase']}; {verdict}")
        return kills, run


def main() -> None:
    """Parses the command line, and exits with status 1 if anything differs."""
    parser = script.Parser(__doc__, "kills.json")
    parser.add_argument("--kills", type=script.at_least(1), default=50, help="of each walk (default: 50)")
    parser.add_argument("--walk", choices=(*WALKS, "both"), default="both", help="(default: both)")
    parser.add_argument("--method", default="nufilt", help="(default: nufilt)")
    arguments = parser.parse_args()
    walks = tuple(WALKS) if arguments.walk == "both" else (arguments.walk,)
    rows, kills = [], {}
    for walk in walks:
        kills[walk], undisturbed = study(walk, arguments.kills, ("--method", arguments.method))
        rows.append(row(walk, kills[walk], undisturbed))
    document = {
        "benchmark": "kills",
        "environment": measure.environment("orbax-checkpoint", "safetensors"),
        "settings": script.settings(arguments) | {"tasks": TASKS, "windows": WINDOWS},
        "kills": kills,
        "tables": [records.table(TITLE, COLUMNS, rows)],
    }
    records.finish(document, arguments.json or records.RESULTS / "kills.json")
    if any(one["differences"] or one["repeated"] > LIMIT for found in kills.values() for one in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
