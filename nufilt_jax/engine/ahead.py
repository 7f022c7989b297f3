"""Ahead of their turn: a task is read, and what solves it compiled, while something else is done."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

from nufilt_jax.engine.timing import CompileLog
from nufilt_jax.engine.uninterrupted import COMPILING

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


class ReadAhead(Generic[Item, Loaded]):
    """Loads items in order, in a thread of its own: one at a time, each when it is told to, and keeps none.

    A load is called with an item and an event, and should end soon once that is set. It may read, and put arrays on
    the device; it must not start a program, since on CPU no two that decompose may be in flight (`linalg.dispatch`).
    Leaving the context ends the load under way.
    """

    def __init__(self, load: Callable[[Item, threading.Event], Loaded], items: Iterable[Item]) -> None:
        self._load, self._left = load, deque(items)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._coming: Future[Loaded] | None = None

    @property
    def has_begun(self) -> bool:
        """Whether the next item is being loaded, or is there."""
        return self._coming is not None

    def begin(self) -> None:
        """Begins to load the next item, unless that has begun or none is left."""
        if self._coming is None and self._left:
            self._coming = self._pool.submit(self._load, self._left.popleft(), self._stop)

    def take(self) -> Loaded:
        """The next item, loaded; raises what its load raised."""
        self.begin()
        coming, self._coming = self._coming, None
        if coming is None:
            raise IndexError("no item is left")
        return coming.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown()  # waits: no thread may read on when the run has ended


class CompileAhead:
    """Compiles in a thread of its own.

    A compiler cannot be stopped. Nobody therefore waits for it but who needs the program: a run that fails meanwhile
    ends, and the command line's process does not stay for the thread (`commands.watched.leave`).

    Attributes:
      log: of what is compiled here.
    """

    def __init__(self, prepare: Callable[[], None]) -> None:
        self.log = CompileLog(self._note)
        self._prepare, self._program = prepare, "the solve"
        self._thread = threading.Thread(target=self._run, name=COMPILING)
        self._thread.start()

    def _run(self) -> None:
        # What fails here fails again where the program is needed, and is told there.
        with contextlib.suppress(Exception), self.log.listening():
            self._prepare()

    def _note(self, program: str) -> None:
        self._program = program

    def wait(self, tell: Callable[[str], None]) -> None:
        """Returns when it is through; `tell` is told what is waited for, if anything is."""
        if self._thread.is_alive():
            tell(self._program)
        self._thread.join()
