"""Fuzzes the readers of safetensors headers, indexes and Flax's msgpack by coverage, with atheris.

Each reader starts from its corpus in `tests/faults/corpus`. Whatever it raises but a refusal in words, more than 2 s of
the processor, or more than 500 MB for one input, is a finding: its input is kept in the folder `--out`. What was
executed and found is printed as JSON, with the commit that it was found at; with findings, the exit status is 1.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import measure, script
from benchmarks.common.records import ROOT
from benchmarks.faults import readers
from benchmarks.faults.readers import Target

_HANGS = 20  # seconds of the clock after which libFuzzer ends the process
_LONGEST = 4096  # bytes of an input
_EXECUTED = re.compile(rb"number_of_executed_units:\s*(\d+)")
_COVERED = re.compile(rb"cov: (\d+)")


def is_installed() -> bool:
    """Whether this Python can fuzz."""
    return importlib.util.find_spec("atheris") is not None


def fuzz(target: Target, seconds: int, out: Path | None = None, *, keep: bool = False) -> dict[str, Any]:
    """Fuzzes one reader in a process of its own.

    Args:
      target: the reader.
      seconds: for which inputs are tried.
      out: the folder that gets the inputs of findings; None to drop them.
      keep: put into the corpus what reaches code that it did not reach, in as few inputs as that takes.

    Returns:
      `reader`, `seconds`, `executions`, `failing`: how many of these were not as they should be, `places`: of the code
      that were reached, `inputs`: of the corpus, and `findings`: of each place that failed, the last line of the first
      traceback.
    """
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as name:
        work = Path(name)
        found, grown = work / "found", work / "grown"
        found.mkdir()
        grown.mkdir()
        limits = (f"-timeout={_HANGS}", "-rss_limit_mb=4096", f"-artifact_prefix={found}/finding-")
        log = _run(
            target, work, f"-max_total_time={seconds}", "-print_final_stats=1", *limits, grown, _corpus_of(target)
        )
        executed, covered = _EXECUTED.findall(log), _COVERED.findall(log)
        if not executed:
            raise SystemExit(f"fuzzing of {target.name} ended before its time:\n{log.decode(errors='replace')[-3000:]}")
        inputs = [path for path in sorted(found.iterdir()) if not path.suffix]
        findings = [_told(path) for path in inputs]
        failing = _failing(work) + sum(not _trace(path).is_file() for path in inputs)
        if findings and out is not None:
            shutil.copytree(found, out / target.name, dirs_exist_ok=True)
        if keep:
            _keep(target, work, grown)
    return {
        "reader": target.name,
        "seconds": seconds,
        "executions": int(executed[-1]),
        "failing": failing,
        "places": int(covered[-1]) if covered else 0,
        "inputs": len(list(readers.corpus(target))),
        "findings": findings,
    }


def _corpus_of(target: Target) -> Path:
    return readers.CORPUS / target.name


def _run(target: Target, work: Path, *options: object) -> bytes:
    """What libFuzzer says."""
    command = [sys.executable, "-m", "benchmarks.faults.fuzz_target", target.name, work, f"-max_len={_LONGEST}"]
    ended = subprocess.run([*map(str, command), *map(str, options)], cwd=ROOT, stderr=subprocess.PIPE, check=False)
    return ended.stderr


def _told(path: Path) -> str:
    """The last line of the traceback of a finding; libFuzzer's own, hangs and the like, have their names alone."""
    trace = _trace(path)
    return trace.read_text().strip().splitlines()[-1] if trace.is_file() else path.name


def _trace(path: Path) -> Path:
    return path.with_suffix(".txt")


def _failing(work: Path) -> int:
    """How many executions raised what is no refusal."""
    path = work / readers.FAILING
    return len(path.read_bytes()) if path.is_file() else 0


def _keep(target: Target, work: Path, grown: Path) -> None:
    """Adds to the corpus the inputs that reach what it does not."""
    _run(target, work, "-set_cover_merge=1", "-use_counters=0", _corpus_of(target), grown)


def study(seconds: int, out: Path | None = None, *, keep: bool = False) -> list[dict[str, Any]]:
    """Fuzzes every reader for so many seconds; see `fuzz`."""
    results = []
    for target in readers.TARGETS.values():
        results.append(fuzz(target, seconds, out, keep=keep))
        script.say(f"{target.name}: {results[-1]['executions']} executions, {len(results[-1]['findings'])} findings")
    return results


def main() -> None:
    """Parses the command line, and exits with status 1 if anything was found."""
    parser = script.Parser(__doc__, "")
    parser.add_argument("--seconds", type=script.at_least(1), default=200, help="for each reader (default: 200)")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="folder of inputs that were not read")
    parser.add_argument("--keep", action="store_true", help="put into the corpus what reaches more than it does")
    arguments = parser.parse_args()
    if not is_installed():
        parser.exit(1, f"{parser.prog}: atheris is not installed (pip install 'nufilt_jax[fuzz]', or make fuzz)\n")
    results = study(arguments.seconds, arguments.out, keep=arguments.keep)
    document = json.dumps({**measure.checkout(), "fuzz": results}, indent=1)
    if arguments.json:
        arguments.json.write_text(document + "\n")
    sys.stdout.write(document + "\n")
    if any(row["findings"] for row in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
