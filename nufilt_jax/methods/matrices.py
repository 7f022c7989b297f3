"""Rules that treat matrices one way and all other tensors another: a layer's mathematics, spread over the stacks."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from nufilt_jax.config import MethodConfig
from nufilt_jax.errors import Problem, SolveError, raise_all
from nufilt_jax.linalg.dispatch import LAPACK_BATCH, in_chunks, layers_at_once, run_alone
from nufilt_jax.linalg.factored import all_finite
from nufilt_jax.linalg.programs import Program, by_platform, is_traced
from nufilt_jax.linalg.spread import spread
from nufilt_jax.methods.elementwise import blend
from nufilt_jax.methods.stacked import Names, Stacked, TaskVector, Tensor, TensorStacks
from nufilt_jax.methods.state import Context, ScaledConfig

# The mathematics of one layer: arrays in, a pytree of arrays out, its config by keyword.
LayerRule = Callable[..., Any]


def each_layer(rule: LayerRule, *stacks: Tensor, config: MethodConfig, mesh: Mesh | None = None) -> Any:
    """`rule` for every layer of a stack, as one program; on CPU a few layers at a time.

    Args:
      rule: for one layer. A function of a module, so that its program is compiled once; decompositions inside it wait
        for one another (`dispatch.after`).
      *stacks: arrays with a leading layer axis. The program may take the memory of the first one.
      config: static.
      mesh: divides the layers among its devices; what `rule` returns, or returns first, is then of the first stack's
        shape. None for one device.

    Returns:
      What `rule` returns, with a leading layer axis.
    """
    if mesh is None or is_traced(stacks):
        return run_alone(functools.partial(_program, rule=rule, config=config), *stacks)
    ((first, rest),) = spread(_of_one_stack, mesh, stacks[:1], (stacks[1:],), rule=rule, config=config)
    return (first, *rest) if rest else first


def _of_one_stack(
    first: TensorStacks, others: tuple[TensorStacks, ...], *, rule: LayerRule, config: MethodConfig
) -> tuple[tuple[Tensor, tuple], ...]:
    """The same as `linalg.spread` takes it."""
    found = _program(*first, *others[0], rule=rule, config=config)
    return ((found[0], found[1:]),) if isinstance(found, tuple) else ((found, ()),)


@functools.partial(Program, static_argnames=("rule", "config"), donate_argnums=0)
def _program(*stacks: Tensor, rule: LayerRule, config: MethodConfig) -> Any:
    layer = jax.vmap(functools.partial(rule, config=config))

    def chunked(size: Callable[[], int]) -> Callable[..., Any]:
        return lambda *arrays: in_chunks(layer, arrays, size())

    return by_platform(*stacks, cpu=chunked(layers_at_once), default=chunked(lambda: LAPACK_BATCH))


def require_finite(merged: Stacked, fix: str = "") -> None:
    """Refuses a result with NaN or infinite numbers, as a decomposition leaves that has failed, or an overflow.

    Under a caller's `jax.jit` nothing is known of the numbers, and nothing is refused.

    Raises:
      SolveError: the tensors, all listed.
    """
    if is_traced(merged):
        return
    flags = jax.device_get(_is_finite(merged.stacks))
    finite = {
        name: ok
        for members, row in zip(merged.names, flags, strict=True)
        for name, ok in zip(members, row, strict=True)
    }
    broken = (name for name, ok in finite.items() if not ok)
    raise_all(SolveError, (Problem("task", "the solution is not finite", fix, name) for name in broken))


@jax.jit
def _is_finite(stacks: TensorStacks) -> TensorStacks:
    """Of every tensor of every stack, whether all its numbers are finite."""
    return tuple(all_finite(x) for x in stacks)


def split(delta: Stacked, is_first: Callable[[str, tuple[int, ...]], bool]) -> tuple[Names, Names]:
    """The stacks that hold a tensor of which `is_first(name, shape)` is true, and the others."""
    shapes = delta.shapes
    # Never within a stack, which one program takes whole; a rule masks what in it is not its own.
    first = tuple(members for members in delta.names if any(is_first(name, shapes[name]) for name in members))
    return first, tuple(members for members in delta.names if members not in first)


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Any tensor of two dimensions, embeddings included."""
    # The authors' programs ask for the number of dimensions, not for the kind of layer.
    return len(shape) == 2


def matrices_or_mean(rule: LayerRule, delta: Stacked, task: TaskVector, context: Context[ScaledConfig]) -> Stacked:
    """`rule` of D and τ for every matrix, λ (D + τ)/2 for all other tensors; may take the memory of D.

    Args:
      rule: for one layer, of D and τ.
      delta: D.
      task: τ.
      context: its settings, λ among them, and the devices that share the layers.
    """
    config = context.config
    matrices, others = split(delta, is_matrix)
    pairs = zip(delta.only(matrices).stacks, task.only(matrices).stacks, strict=True)
    merged = Stacked(tuple(each_layer(rule, d, t, config=config, mesh=context.mesh) for d, t in pairs), matrices)
    # The mean of two operands at every step: of older tasks a half is lost each time.
    return merged + blend(delta.only(others), task.only(others), keep=config.scale / 2, gain=config.scale / 2)
