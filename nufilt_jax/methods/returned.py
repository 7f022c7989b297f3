"""What a rule returns, held against what it was given: a rule of the user's own may return anything."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nufilt_jax.config import problem
from nufilt_jax.errors import ConfigError, Problem, raise_all
from nufilt_jax.linalg.factored import Factored
from nufilt_jax.methods.stacked import Stacked
from nufilt_jax.methods.state import Advance


def checked(rule: str, given: Stacked, done: Any) -> Advance:
    """What a rule returned, told from shapes and types alone; numbers beside D become arrays, as they are kept.

    Args:
      rule: its name.
      given: D before it.
      done: what it returned.

    Raises:
      ConfigError: D is not of the layers, shapes and type that were given, or what stands beside it are no numbers.
    """
    if not isinstance(done, Advance) or not isinstance(done.delta, Stacked):
        wanted, got = ("Stacked for D", done.delta) if isinstance(done, Advance) else ("Advance", done)
        what = f"{rule} returned a {type(got).__name__}, and must return a nufilt_jax.methods.{wanted}"
        raise ConfigError(problem("method", what))
    names = done.delta.names  # the stacks in whatever order, each as it was
    if sorted(names) != sorted(given.names) or len(done.delta.stacks) != len(names):
        what = f"{rule} returned D with other layers than it was given, or in another order"
        raise ConfigError(problem("method", what, "give the stacks of state.delta anew, and its names"))
    # Of NumPy's own numbers: nothing is lost that the state would keep.
    stacks = tuple(_float32(stack) for stack in done.delta.stacks)
    extra, added = _arrays(done.extra), _arrays(done.added)
    delta = Stacked(stacks, names)
    found = [
        *_other_stacks(rule, given, delta),
        *_no_numbers(rule, "extra", extra),
        *_no_numbers(rule, "added", added),
    ]
    raise_all(ConfigError, found)
    return done._replace(delta=delta, extra=extra, added=added)


def _float32(stack: Any) -> Any:
    return stack.astype(np.float32) if isinstance(stack, np.ndarray) and stack.dtype == np.float64 else stack


def _arrays(named: Mapping[str, Any]) -> dict[str, Any]:
    is_array = jax.Array | np.ndarray | Factored
    return {name: x if isinstance(x, is_array) else np.asarray(x) for name, x in named.items()}


def _other_stacks(rule: str, given: Stacked, delta: Stacked) -> Iterator[Problem]:
    for members, before, after in zip(delta.names, given.only(delta.names).stacks, delta.stacks, strict=True):
        if (was := _told(before)) != (now := _told(after)):
            what = f"{rule} returned D of {members[0]} and its like as {now}, and was given {was}"
            yield problem("method", what, "D is float32, in stacks of [layers, m, n]")


def _told(stack: Any) -> str:
    if not hasattr(stack, "shape"):
        return f"a {type(stack).__name__}"
    return f"{list(stack.shape)} {stack.dtype}"


def _no_numbers(rule: str, where: str, named: Mapping[str, Any]) -> Iterator[Problem]:
    for name, x in named.items():
        if not (jnp.issubdtype(x.dtype, np.number) or x.dtype == bool):
            what = f"{rule} returned {name!r} in {where}, which is no array of numbers"
            yield problem("method", what, "a state on disk holds no others")
