"""Continual TIES-Merging: Yadav et al., arXiv:2306.01708, one task vector at a time.

The kernel is the authors' program's: thresholds over the whole model, the elected sign's entries summed, not averaged.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt32

from nufilt_jax.config import Variant, number
from nufilt_jax.methods.order import Weights, count, is_less, kth_smallest_magnitude, magnitude_bits
from nufilt_jax.methods.selection import every_tensor, n_copies
from nufilt_jax.methods.stacked import Array, Stacked, Stacks, TaskVector
from nufilt_jax.methods.state import Advance, Context, MergeState, Rule, ScaledConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiesConfig(ScaledConfig):
    """TIES-Merging, continual.

    Attributes:
      scale: factor on what is added; 0.3 for 8 tasks, 0.1 for 14 and 20, 0.3 for Flan-T5 (Table 9).
      density: share of the entries that trimming keeps (Table 9); above 1 it is read as a percentage.
      variant: `code` trims and elects between D and τ, as the authors' program does; `text` between the previous
        TIES output and τ (Appendix B.3), which is one more vector to remember.
      merge_first: merges the first task. False leaves it out, as the authors' program for Flan-T5 does (Table 2).
      embedding_copies: how often a T5's token embedding counts and is updated; 3 in that program, which knows it
        under three names.
    """

    scale: float = 0.3
    density: float = number(0.2, at_least=0, at_most=100)
    variant: Variant = "code"
    merge_first: bool = True
    embedding_copies: int = number(1, at_least=1)


def first(state: MergeState, task: TaskVector, context: Context[TiesConfig]) -> Advance:
    """θ^m_1 = θ0 + λ c τ_1, untrimmed, c as in `advance`; θ0 if the first task is left out."""
    config = context.config
    # The program for Flan-T5 computes its first step and never applies it.
    outputs = task.stacks if config.merge_first else jax.tree.map(jnp.zeros_like, task.stacks)
    delta = _add(state.delta.stacks, outputs, jnp.float32(config.scale), weights=_weights(task, config))
    return Advance(Stacked(delta, task.names), extra=dict(zip(_keys(task, config), outputs, strict=False)))


def advance(state: MergeState, task: TaskVector, context: Context[TiesConfig]) -> Advance:
    """θ^m_t = θ^m_{t−1} + λ TIES_p(D, τ).

    In the `text` variant the operand is the previous output instead of D (Appendix B.3 of arXiv:2509.21413v2): at
    t = 2 that is τ_1, or zero if the first task is left out; it is kept in `extra`, stack by stack. With c =
    `embedding_copies`, every entry of a T5's token embedding counts c times for thresholds and majority, and what is
    added to it is c λ Z.
    """
    config, weights, keys = context.config, _weights(task, context.config), _keys(task, context.config)
    previous = tuple(state.extra[key] for key in keys)
    sizes = (math.prod(stack.shape[1:]) for stack in task.stacks)
    n_entries = sum(size * sum(copies) for size, copies in zip(sizes, weights, strict=True))
    k, scale = cut_order(n_entries, config.density), jnp.float32(config.scale)
    delta, outputs = _step(state.delta.stacks, previous, task.stacks, scale, k=k, weights=weights)
    return Advance(Stacked(delta, task.names), extra=dict(zip(keys, outputs, strict=True)))


def _weights(task: TaskVector, config: TiesConfig) -> Weights:
    """C of every tensor of every stack."""
    return tuple(tuple(n_copies(name, config.embedding_copies) for name in members) for members in task.names)


def _keys(task: TaskVector, config: TiesConfig) -> list[str]:
    """Under which names a step's outputs are remembered, stack by stack; none if they are not."""
    return [f"output {index}" for index in range(len(task.names))] if config.variant == "text" else []


@functools.partial(jax.jit, static_argnames=("k", "weights"), donate_argnums=0)
def _step(
    delta: Stacks, previous: Stacks, task: Stacks, scale: Float[Array, ""], *, k: int, weights: Weights
) -> tuple[Stacks, Stacks]:
    """D + λ c Z, and Z where it is to be remembered; takes the memory of D."""
    outputs = ties_of_stacks(previous or delta, task, k, weights)
    return _add(delta, outputs, scale, weights=weights), outputs if previous else ()


@functools.partial(jax.jit, static_argnames="weights", donate_argnums=0)
def _add(delta: Stacks, outputs: Stacks, scale: Float[Array, ""], *, weights: Weights) -> Stacks:
    """D + λ c Z, c the copies of each tensor; takes the memory of D."""
    merged = []
    for d, z, copies in zip(delta, outputs, weights, strict=True):
        # A tensor known under three names is moved three times.
        c = np.array(copies, np.float32).reshape((-1,) + (1,) * (d.ndim - 1))
        merged.append(d + scale * c * z)
    return tuple(merged)


def ties(x: Float[Array, "*shape"], y: Float[Array, "*shape"], density: float) -> Float[jax.Array, "*shape"]:
    """Z = TIES_p(x, y) of one pair of arrays: trim each, elect a sign for every entry, sum the entries that have it.

    Args:
      x: one operand.
      y: the other.
      density: p, share of the entries that trimming keeps; above 1 it is read as a percentage. 1 trims nothing. All
        entries as large as the threshold are kept.
    """
    return ties_at(x, y, cut_order(x.size, density))


def ties_at(
    x: Float[Array, "*shape"], y: Float[Array, "*shape"], k: int | UInt32[Array, ""]
) -> Float[jax.Array, "*shape"]:
    """`ties` with the order k of the thresholds, which may be known only while the program runs."""
    return ties_of_stacks((x[None],), (y[None],), k)[0][0]


def cut_order(n_entries: int, density: float) -> int:
    """The place q = d − ⌊p d⌋ of the threshold among d magnitudes in rising order; 0 if nothing is trimmed."""
    # The authors' settings write 20 for 0.2; 1 is a share, so that percentages begin above it.
    return n_entries - int(n_entries * (density / 100 if density > 1 else density))


def ties_of_stacks(
    xs: Stacks, ys: Stacks, k: int | UInt32[Array, ""], weights: Weights | None = None
) -> tuple[jax.Array, ...]:
    """`ties_at` of two models, each one vector in the eyes of threshold and election.

    Args:
      xs: one operand, a stack of tensors for every shape.
      ys: the other.
      k: place of the threshold among all entries.
      weights: how often the entries of every tensor count; None for once.
    """
    cuts = kth_smallest_magnitude(xs, k, weights), kth_smallest_magnitude(ys, k, weights)

    def trimmed(x: Array, y: Array) -> tuple[Array, Array]:
        return trim(x, cuts[0]), trim(y, cuts[1])

    def is_negative_or_positive(x: Array, y: Array) -> tuple[Array, Array]:
        total = jnp.add(*trimmed(x, y))
        return total < 0, total > 0

    votes = count(is_negative_or_positive, xs, ys, weights=weights)
    negative, positive = (jax.tree.map(lambda n, i=i: n[i], votes) for i in range(2))
    majority = is_less(negative, positive)
    return tuple(disjoint_sum(*trimmed(x, y), majority) for x, y in zip(xs, ys, strict=True))


def trim(x: Float[Array, "*shape"], cut: Float[Array, ""]) -> Float[Array, "*shape"]:
    """Sets the entries of magnitude below `cut` to zero."""
    # All that equal the threshold stay, so that the order of entries never matters.
    return jnp.where(magnitude_bits(x) >= magnitude_bits(cut), x, 0)


def disjoint_sum(
    x: Float[Array, "*shape"], y: Float[Array, "*shape"], majority: Bool[Array, ""]
) -> Float[jax.Array, "*shape"]:
    """The sum of those of x and y that have the sign of x + y; where they cancel, the majority's: positive if true."""
    total = x + y
    # A sum: the mean of the original paper is not what the authors' program takes.
    is_positive = (total > 0) | ((total == 0) & majority)
    return jnp.where(is_positive, jnp.maximum(x, 0) + jnp.maximum(y, 0), jnp.minimum(x, 0) + jnp.minimum(y, 0))


RULE = Rule(
    name="ties",
    config=TiesConfig,
    first=first,
    advance=advance,
    scope=every_tensor,
    update="θ + λ TIES(D, τ): of the model's largest entries of both, those of the elected sign are added",
    touches="every tensor",
    cost="order statistics of two models, O(mn)",
    source="Yadav et al., arXiv:2306.01708",
    whole_model=True,
    states=2,
    workspace=2.0,
)
