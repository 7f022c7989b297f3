"""How programs are traced and compiled: for which platform, and by which options of its compiler."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Generic, ParamSpec, TypeVar

import jax
from jax.core import Tracer
from jax.extend.core import get_opaque_trace_state

P = ParamSpec("P")
R = TypeVar("R")
Options = dict[str, Any]

# One module for all code of a program, in place of one for each of its hundreds of fusions: XLA's CPU compiler is
# through in two thirds of the time. Its loops over elements are several times slower: products hardly notice. LLVM's
# level 1 of 3 takes a quarter less time again, and runs as fast; at level 0 one layer has other bits than two.
_SOONER_ON_CPU: Options = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}
_LAST_WITH_IT = (0, 11, 0)  # the jax whose XLA still has the option
# Level 1 of 3 (the default is 2): a refinement of 12 x 768 x 768 takes the TPU's compiler 11 s of processor time in
# place of 48, its code 7 MB in place of 19 (v5e). A merge waits for a program once and runs it a few times.
_SOONER_ON_TPU: Options = {"optimization_level": 19}  # O1, as XLA numbers it: jax has no public name for it
_UNTRACED = get_opaque_trace_state()
# What the program being traced will run on; None where nobody knows.
_platform: ContextVar[str | None] = ContextVar("platform", default=None)
_ONE_NAME = ("cpu", "tpu")  # a GPU's platform is called cuda or rocm when something is lowered for it


class Program(Generic[P, R]):
    """A jitted function; alone, it is compiled with `options`, inside a caller's `jax.jit` as it is.

    Args:
      function: to be compiled.
      by_elements: whether loops over elements are a large part of it.
      **how: as for `jax.jit`.
    """

    def __init__(self, function: Callable[P, R], *, by_elements: bool = False, **how: Any) -> None:
        functools.update_wrapper(self, function)

        @functools.cache
        def alone(platform: str) -> Any:
            @functools.wraps(function)
            def traced(*args: P.args, **kwargs: P.kwargs) -> R:
                with _traced_for(platform):
                    return function(*args, **kwargs)

            return jax.jit(traced, compiler_options=options(platform, by_elements=by_elements), **how)

        self._alone = alone
        self._inside = jax.jit(function, **how)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result."""
        # JAX takes options for a whole program only.
        if is_traced((args, kwargs)) or get_opaque_trace_state() != _UNTRACED:
            with _traced_for(None):  # which the caller's may yet be lowered for
                return self._inside(*args, **kwargs)
        return self._alone(_platform_of((args, kwargs)))(*args, **kwargs)

    def prepare(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Compiles it for a call alone with arrays of these shapes, in any thread; the numbers are not looked at."""
        self._alone(jax.default_backend()).lower(*args, **kwargs).compile()

    def __getattr__(self, name: str) -> Any:
        """What else a jitted function has, as `lower`: that of the one that runs alone."""
        return getattr(self.__dict__["_alone"](jax.default_backend()), name)


@contextlib.contextmanager
def _traced_for(platform: str | None) -> Iterator[None]:
    before = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(before)


def by_platform(*operands: Any, default: Callable[..., R], **branches: Callable[..., R]) -> R:
    """`jax.lax.platform_dependent`; where a `Program` runs alone, only the branch that it takes is traced."""
    platform = _platform.get()
    if platform in _ONE_NAME:
        return branches.get(platform, default)(*operands)
    return jax.lax.platform_dependent(*operands, default=default, **branches)


def options(platform: str, *, by_elements: bool = False) -> Options:
    """What the compiler of `cpu`, `gpu` or `tpu` is told, as far as this version of it understands that.

    What the user's XLA_FLAGS say is left to them.
    """
    told: Options = {}
    if platform == "cpu" and not by_elements and jax.__version_info__ <= _LAST_WITH_IT:
        told = _SOONER_ON_CPU
    elif platform == "tpu":
        told = _SOONER_ON_TPU
    theirs = {flag.partition("=")[0].lstrip("-") for flag in os.environ.get("XLA_FLAGS", "").split()}
    return {name: value for name, value in told.items() if name not in theirs}


def platforms_of(tree: Any) -> Iterator[str]:
    """What the arrays of `tree` live on, one after another."""
    return (d.platform for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) for d in x.devices())


def _platform_of(tree: Any) -> str:
    """What a program of these arguments runs on."""
    return next(platforms_of(tree), jax.default_backend())


def is_traced(tree: Any) -> bool:
    """Whether a caller's `jax.jit` is being traced, so that no array has numbers yet."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))
