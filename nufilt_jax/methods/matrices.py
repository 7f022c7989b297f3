"""Rules that treat matrices one way and all other tensors another: a layer's mathematics, spread over the stacks."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax

from nufilt_jax.config import MethodConfig
from nufilt_jax.core.dispatch import run_alone
from nufilt_jax.core.linalg import LAPACK_BATCH, in_chunks, layers_at_once
from nufilt_jax.methods.stacked import Array, Names, Stacked


@runtime_checkable
class LayerRule(Protocol):
    """The mathematics of one layer. A function of a module, so that its program is compiled once."""

    def __call__(self, *arrays: Array, config: Any) -> Any:
        """A pytree of arrays from one layer's; decompositions inside it wait for one another (`linalg.after`)."""
        ...


def each_layer(rule: LayerRule, *stacks: Array, config: MethodConfig) -> Any:
    """`rule` for every layer of a stack, as one program; on CPU a few layers at a time.

    Args:
      rule: for one layer.
      *stacks: arrays with a leading layer axis. The program may take the memory of the first one.
      config: static.

    Returns:
      What `rule` returns, with a leading layer axis.
    """
    return run_alone(functools.partial(_program, rule=rule, config=config), *stacks)


@functools.partial(jax.jit, static_argnames=("rule", "config"), donate_argnums=0)
def _program(*stacks: Array, rule: LayerRule, config: MethodConfig) -> Any:
    layer = jax.vmap(functools.partial(rule, config=config))

    def chunked(size: Callable[[], int]) -> Callable[..., Any]:
        return lambda *arrays: in_chunks(layer, arrays, size())

    return jax.lax.platform_dependent(*stacks, cpu=chunked(layers_at_once), default=chunked(lambda: LAPACK_BATCH))


def split(delta: Stacked, is_first: Callable[[str, tuple[int, ...]], bool]) -> tuple[Names, Names]:
    """The stacks that hold a tensor of which `is_first(name, shape)` is true, and the others."""
    shapes = delta.shapes
    first = tuple(members for members in delta.names if any(is_first(name, shapes[name]) for name in members))
    return first, tuple(members for members in delta.names if members not in first)


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Any tensor of two dimensions, embeddings included."""
    return len(shape) == 2
