"""Runs the package's command in windows of a chosen size, and notes when cells begin and end.

python -m benchmarks.study.in_windows MOST_BYTES EVENTS merge ...

`--max-memory` cuts no small model into windows: of any cap 950 MB are the runtime's. So the layout is called with
another size of window, on two cores, that a stack has as many pieces on every machine. Nothing else is changed.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

CORES = 2


def arm(most_bytes: int, events: Path) -> None:
    """Makes every merge of this process lay windows of at most so many bytes, and tell of its cells."""
    from nufilt_jax.engine import grid, layout, walk

    plan_windows, merge = layout.plan_windows, walk.Walk._merge
    log = os.open(events, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def planned(stacks: Any, sizes: Any, reach: Any, cap: Any, done: Any, first: int, **how: Any) -> Any:
        _, memory = plan_windows(stacks, sizes, reach, cap, done, first, **how)
        return grid.restarted(stacks, done, most_bytes, first), memory

    def told(self: walk.Walk, cell: grid.Cell, tasks: Any, number: int, total: int) -> None:
        about = {"layers": cell.window.layers, "task": cell.task}
        tell(log, about | {"what": "begin"})
        merge(self, cell, tasks, number, total)
        tell(log, about | {"what": "end"})

    layout.plan_windows, walk.Walk._merge = planned, told


def tell(log: int, event: dict[str, Any]) -> None:
    """Writes a line by one call to the system, which a kill does not take back."""
    os.write(log, (json.dumps(event | {"at": time.monotonic()}) + "\n").encode())


def main() -> int:
    """Runs the command; its exit status."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    from nufilt_jax import cli
    from nufilt_jax.commands.process import prepare_process

    prepare_process()  # before anything imports JAX
    most_bytes, events, *argv = sys.argv[1:]
    arm(int(most_bytes), Path(events))
    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
