"""`jax.jit` for programs that are large enough for their compiling to be felt."""

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import jax
from jax.extend.core import get_opaque_trace_state

from nufilt_jax.linalg.dispatch import is_traced

Options = dict[str, Any]

# One module for all code of a program, in place of one for each of its hundreds of fusions: XLA's CPU compiler is
# through in two thirds of the time, and what it makes is not slower.
_SOONER_ON_CPU: Options = {"xla_cpu_use_fusion_emitters": False}
_LAST_WITH_IT = (0, 11, 0)  # the jax whose XLA still has the option
# Level 1 of 3 (the default is 2): a refinement of 12 x 768 x 768 takes the TPU's compiler 11 s of processor time in
# place of 48, its code 7 MB in place of 19 (v5e). A merge waits for a program once and runs it a few times.
_SOONER_ON_TPU: Options = {"optimization_level": 19}  # O1, as XLA numbers it: jax has no public name for it
_UNTRACED = get_opaque_trace_state()

P = ParamSpec("P")
R = TypeVar("R")


class Program(Generic[P, R]):
    """A jitted function; alone, it is compiled with `options`, inside a caller's `jax.jit` as it is.

    Args:
      function: to be compiled.
      **how: as for `jax.jit`.
    """

    def __init__(self, function: Callable[P, R], **how: Any) -> None:
        functools.update_wrapper(self, function)
        self._alone = functools.cache(lambda: jax.jit(function, compiler_options=options(jax.default_backend()), **how))
        self._inside = jax.jit(function, **how)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result."""
        # JAX takes options for a whole program only.
        is_inside = is_traced((args, kwargs)) or get_opaque_trace_state() != _UNTRACED
        return (self._inside if is_inside else self._alone())(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What else a jitted function has, as `lower`: that of the one that runs alone."""
        return getattr(self.__dict__["_alone"](), name)


def options(platform: str) -> Options:
    """What the compiler of `cpu`, `gpu` or `tpu` is told, as far as this version of it understands that."""
    if platform == "cpu":
        return _SOONER_ON_CPU if jax.__version_info__ <= _LAST_WITH_IT else {}
    return _SOONER_ON_TPU if platform == "tpu" else {}
