"""Where the time of a run goes, and what it compiled."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jax import monitoring

_COMPILE_EVENTS = "/jax/core/compile/"
_PROGRAM_EVENT = "/jax/core/compile/backend_compile_duration"  # comes for programs found in the cache too
_LOWERED_EVENT = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # what comes next is the compiler itself
_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class Clock:
    """Adds up seconds by what they were spent on."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        """Counts the time inside, however it ends."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(what, time.perf_counter() - start)

    def add(self, what: str, seconds: float) -> None:
        """Counts time measured elsewhere."""
        self._seconds[what] = self._seconds.get(what, 0.0) + seconds

    def seconds(self, what: str) -> float:
        """What was spent on it so far."""
        return self._seconds.get(what, 0.0)

    def as_dict(self) -> dict[str, float]:
        """For the recipe."""
        return {what: round(seconds, 3) for what, seconds in self._seconds.items()}


class CompileLog:
    """The programs that JAX traced and compiled, or found in its cache on disk, in the thread that listens.

    Args:
      tell: is told the name of each before it is compiled.
    """

    def __init__(self, tell: Callable[[str], None] = lambda name: None) -> None:
        self._tell = tell
        self._programs = self._cached = self._thread = 0
        self._spans: list[tuple[float, float]] = []

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Counts what is compiled inside."""
        self._thread = threading.get_ident()
        monitoring.register_event_duration_secs_listener(self._on_duration)
        monitoring.register_event_listener(self._on_event)  # of the cache: it says hits by events without a length
        try:
            yield
        finally:
            monitoring.unregister_event_duration_listener(self._on_duration)
            monitoring.unregister_event_listener(self._on_event)

    def as_dict(self) -> dict[str, Any]:
        """For the recipe."""
        return {"programs": self._programs, "from_cache": self._cached, "seconds": round(self.seconds, 3)}

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside, in which another thread compiles, as its own."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spans.append((start, time.perf_counter()))

    def with_those_of(self, other: "CompileLog") -> "CompileLog":
        """What both have counted."""
        both = CompileLog()
        both._programs, both._cached = self._programs + other._programs, self._cached + other._cached
        both._spans = self._spans + other._spans
        return both

    def _on_duration(self, event: str, duration_secs: float, **facts: str | int) -> None:
        if threading.get_ident() != self._thread:
            return
        if event == _LOWERED_EVENT:
            self._tell(str(facts.get("fun_name", "")).removeprefix("jit(").strip("_()"))
        if event.startswith(_COMPILE_EVENTS):
            now = time.perf_counter()
            self._spans.append((now - duration_secs, now))
        self._programs += event == _PROGRAM_EVENT

    def _on_event(self, event: str, **_: str | int) -> None:
        self._cached += event == _HIT_EVENT and threading.get_ident() == self._thread

    @property
    def seconds(self) -> float:
        """Length of the union of all spans: the tracing of a function holds that of the functions it calls."""
        total, reached = 0.0, 0.0
        for start, end in sorted(self._spans):
            total += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return total
