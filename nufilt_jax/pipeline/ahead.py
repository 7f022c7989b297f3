"""Reading ahead: the next task is loaded while the present one is merged."""

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def read_ahead(load: Callable[[Item, threading.Event], Loaded], items: Sequence[Item]) -> Generator[Loaded, None, None]:
    """Yields `load(item, stop)` in order; while the caller works on one, the next is loaded, and no more than that.

    What a load raises is raised where its turn comes. Close the iterator to end early: `stop` is set then, and the
    load under way should end soon. A load may read, and put arrays on the device; it must not start a program, since on
    CPU no two that decompose may be in flight (see `core.dispatch`).
    """
    stop = threading.Event()
    n_taken = 0
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        try:
            coming = [pool.submit(load, item, stop) for item in items[:1]]
            while coming:
                loaded = coming.pop().result()
                n_taken += 1
                coming += [pool.submit(load, item, stop) for item in items[n_taken : n_taken + 1]]
                yield loaded
        finally:
            stop.set()
