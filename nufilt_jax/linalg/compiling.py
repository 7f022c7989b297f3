"""`jax.jit` for programs that are large enough for their compiling to be felt."""

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import jax
from jax.extend.core import get_opaque_trace_state

from nufilt_jax.linalg.dispatch import is_traced

# One module for all code of a program, in place of one for each of its hundreds of fusions: XLA's CPU compiler is
# through in two thirds of the time, and what it makes is not slower.
_SOONER_ON_CPU: dict[str, str | bool] = {"xla_cpu_use_fusion_emitters": False}
_LAST_WITH_IT = (0, 11, 0)  # the jax whose XLA still has the option
_UNTRACED = get_opaque_trace_state()

P = ParamSpec("P")
R = TypeVar("R")


class Program(Generic[P, R]):
    """A jitted function; alone, on a CPU, it is compiled with the options above, inside a caller's `jax.jit` as it is.

    Args:
      function: to be compiled.
      **how: as for `jax.jit`.
    """

    def __init__(self, function: Callable[P, R], **how: Any) -> None:
        functools.update_wrapper(self, function)
        self._alone = functools.cache(lambda: jax.jit(function, compiler_options=_options(), **how))
        self._inside = jax.jit(function, **how)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result."""
        # JAX takes options for a whole program only.
        is_inside = is_traced((args, kwargs)) or get_opaque_trace_state() != _UNTRACED
        return (self._inside if is_inside else self._alone())(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What else a jitted function has, as `lower`: that of the one that runs alone."""
        return getattr(self.__dict__["_alone"](), name)


def _options() -> dict[str, str | bool]:
    """The options, where it is for a CPU that is compiled, by an XLA that knows them."""
    is_known = jax.default_backend() == "cpu" and jax.__version_info__ <= _LAST_WITH_IT
    return _SOONER_ON_CPU if is_known else {}
