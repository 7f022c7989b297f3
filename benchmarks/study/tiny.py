"""Times the built-in demo and stores its accuracies: the numbers that the README quotes.

python -m benchmarks.study.tiny             runs `python -m nufilt_jax.merge --model tiny` twice, in fresh folders
python -m benchmarks.study.tiny --markdown  prints the table of the stored results
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

RESULTS = Path(__file__).parents[1] / "results" / "tiny.json"


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print the table of the stored results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to store the results")
    arguments = parser.parse_args()
    if not arguments.markdown:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(measure(), indent=1) + "\n")
    Console(highlight=False).print(markdown(json.loads(arguments.out.read_text())), soft_wrap=True)


def measure() -> dict[str, Any]:
    """Runs the demo with an empty cache, and again into another folder with the cache filled."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUFILT_CACHE": f"{folder}/cache"}
        runs = []
        for name in ("first", "second"):
            command = [
                sys.executable,
                "-m",
                "nufilt_jax.merge",
                "--model",
                "tiny",
                "--json",
                "--out",
                f"{folder}/{name}",
            ]
            start = time.perf_counter()
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            runs.append((time.perf_counter() - start, json.loads(done.stdout)))
    (first, document), (second, _) = runs
    return {
        "command": "python -m nufilt_jax.merge --model tiny",
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        ).stdout.strip(),
        "device": document["device"],
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "versions": document["versions"],
        "config": document["config"],
        "seconds_first_run": round(first, 1),
        "seconds_with_compile_cache": round(second, 1),
        "tasks_in_order": document["evaluation"]["tasks"],
        "models": document["evaluation"]["models"],
    }


def markdown(results: dict[str, Any]) -> str:
    """Accuracies in percent, one row per model, and what the demo took."""
    tasks = sorted(results["tasks_in_order"])
    lines = [
        "| | " + " | ".join(tasks) + " | ACC | BWT |",
        "| --- |" + " ---: |" * (len(tasks) + 2),
    ]
    for row in results["models"]:
        cells = [f"{100 * row['accuracy'][task]:.1f}" for task in tasks]
        bwt = "" if row["bwt"] is None else f"{100 * row['bwt']:+.1f}"
        lines.append(f"| {row['name']} | " + " | ".join(cells) + f" | {100 * row['acc']:.1f} | {bwt} |")
    times = (
        f"{results['seconds_first_run']} s, and {results['seconds_with_compile_cache']} s with the compile cache filled"
    )
    where = f"{results['cores']} CPU cores, Python {results['versions']['python']}, jax {results['versions']['jax']}"
    return "\n".join([*lines, "", f"`{results['command']}` took {times} ({where})."])


if __name__ == "__main__":
    main()
