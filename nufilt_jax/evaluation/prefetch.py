"""Work done by threads ahead of whoever needs it, in order and within bounds."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def computed_ahead(work: Callable[[T], R], jobs: Iterable[T], *, threads: int, ahead: int) -> Iterator[R]:
    """`map(work, jobs)`, with up to `ahead` results begun or waiting beyond the one that is asked for.

    What `work` raises comes out where its result would have. When the iterator is left early, jobs under way are
    finished and no others begun.

    >>> list(computed_ahead(str.upper, "abc", threads=2, ahead=1))
    ['A', 'B', 'C']
    """
    pending: collections.deque[Future[R]] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="nufilt-ahead") as pool:
        try:
            for job in jobs:
                pending.append(pool.submit(work, job))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
