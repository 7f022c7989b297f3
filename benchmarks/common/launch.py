"""Runs a command and writes what it took: `python launch.py REPORT COMMAND...`.

A process of its own, and a small one: Linux counts towards the peak of a child what its parent held while it started
the child, and who measures may hold gigabytes.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def main(report: str, *command: str) -> None:
    """Runs the command with this process's folder, environment and streams.

    Args:
      report: file to write, as JSON: `wall` and `processor` in seconds, `peak` in bytes, and the command's `status`,
        negative for a signal.
      *command: program and arguments.
    """
    start = time.perf_counter()
    status = subprocess.run(command, check=False).returncode
    wall = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    took = {"wall": wall, "processor": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss * unit}
    Path(report).write_text(json.dumps({**took, "status": status}))


if __name__ == "__main__":
    main(*sys.argv[1:])
