"""Continual TIES-Merging: Yadav et al., arXiv:2306.01708, one task vector at a time.

The kernel is the authors' program's: thresholds over the whole model, the elected sign's entries summed, not averaged.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt32

from nufilt_jax.config import Variant, number
from nufilt_jax.methods.order import (
    HALF,
    Count,
    Weights,
    count_entries,
    half_counts,
    is_less,
    kth_smallest_magnitude,
    magnitude_bits,
    place_in,
)
from nufilt_jax.methods.selection import every_tensor, n_copies
from nufilt_jax.methods.stacked import Stacked, TaskVector, Tensor, TensorStacks, restacked
from nufilt_jax.methods.state import Advance, Context, Look, MergeState, Numbers, Rule, ScaledConfig


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
    remembered = outputs if config.variant == "text" else ()
    return Advance(Stacked(delta, task.names), extra=_by_name(remembered, task))


def advance(state: MergeState, task: TaskVector, context: Context[TiesConfig]) -> Advance:
    """θ^m_t = θ^m_{t−1} + λ TIES_p(D, τ).

    In the `text` variant the operand is the previous output instead of D (Appendix B.3 of arXiv:2509.21413v2): at
    t = 2 that is τ_1, or zero if the first task is left out; it is kept in `extra`, layer by layer. With c =
    `embedding_copies`, every entry of a T5's token embedding counts c times for thresholds and majority, and what is
    added to it is c λ Z.
    """
    config, weights, numbers = context.config, _weights(task, context.config), context.numbers
    previous = _previous(state, task, config)
    if not numbers:
        sizes = (math.prod(stack.shape[1:]) for stack in task.stacks)
        n_entries = sum(size * sum(copies) for size, copies in zip(sizes, weights, strict=True))
        k = cut_order(n_entries, config.density)
        numbers = _found(previous or state.delta.stacks, task.stacks, k=k, weights=weights)
    operands, scale = (state.delta.stacks, previous, task.stacks), jnp.float32(config.scale)
    delta, outputs = _step(*operands, numbers["cuts"], numbers["majority"], scale, weights=weights)
    return Advance(Stacked(delta, task.names), extra=_by_name(outputs, task))


def _weights(task: TaskVector, config: TiesConfig) -> Weights:
    """C of every tensor of every stack."""
    return tuple(tuple(n_copies(name, config.embedding_copies) for name in members) for members in task.names)


def _previous(state: MergeState, task: TaskVector, config: TiesConfig) -> TensorStacks:
    """The previous output, in the stacks of τ; none if D is the operand."""
    return restacked(state.extra, task.names) if config.variant == "text" else ()


def _operands(state: MergeState, task: TaskVector, config: TiesConfig) -> tuple[TensorStacks, TensorStacks]:
    return _previous(state, task, config) or state.delta.stacks, task.stacks


def _by_name(outputs: TensorStacks, task: TaskVector) -> dict[str, Tensor]:
    """Outputs to be remembered, by the names of τ; none if there are none."""
    return dict(Stacked(outputs, task.names)) if outputs else {}


@functools.partial(jax.jit, static_argnames="weights", donate_argnums=0)
def _step(
    delta: TensorStacks,
    previous: TensorStacks,
    task: TensorStacks,
    cuts: Float[Tensor, "2"],
    majority: Bool[Tensor, ""],
    scale: Float[Tensor, ""],
    *,
    weights: Weights,
) -> tuple[TensorStacks, TensorStacks]:
    """D + λ c Z, and Z where it is to be remembered; takes the memory of D."""
    outputs = _merged(previous or delta, task, cuts, majority)
    return _add(delta, outputs, scale, weights=weights), outputs if previous else ()


@functools.partial(jax.jit, static_argnames="weights", donate_argnums=0)
def _add(delta: TensorStacks, outputs: TensorStacks, scale: Float[Tensor, ""], *, weights: Weights) -> TensorStacks:
    """D + λ c Z, c the copies of each tensor; takes the memory of D."""
    merged = []
    for d, z, copies in zip(delta, outputs, weights, strict=True):
        # A tensor known under three names is moved three times.
        c = np.array(copies, np.float32).reshape((-1,) + (1,) * (d.ndim - 1))
        merged.append(d + scale * c * z)
    return tuple(merged)


# The same numbers of a model in parts: 16 bits of both thresholds in each of two looks, and the majority in a third.


def _count_halves(state: MergeState, task: TaskVector, context: Context[TiesConfig]) -> Numbers:
    """Of each operand, how many magnitudes have which upper half of bits; or which lower, once the upper is found."""
    weights, operands = _weights(task, context.config), _operands(state, task, context.config)
    upper = context.numbers["bits"].tolist() if context.numbers else (None, None)
    return {"counts": np.stack([half_counts(x, weights, half) for x, half in zip(operands, upper, strict=True)])}


def _narrowed(parts: Sequence[Numbers], config: TiesConfig, found: Numbers) -> Numbers:
    """The thresholds' bits as far as they are found, and their places among the magnitudes that share these."""
    counts = functools.reduce(np.add, (part["counts"] for part in parts))
    k = cut_order(int(counts[0].sum()), config.density)
    bits, places = (found["bits"], found["places"]) if found else (np.zeros(2, np.uint32), (k, k))
    values, places = zip(*map(place_in, counts, places), strict=True)
    bits = bits << HALF | np.array(values, np.uint32)
    return {"bits": bits, "places": places, "cuts": bits.view(np.float32)}


def _vote(state: MergeState, task: TaskVector, context: Context[TiesConfig]) -> Numbers:
    """How many entries are negative, and how many positive."""
    cuts, weights = context.numbers["cuts"], _weights(task, context.config)
    votes = _votes(*_operands(state, task, context.config), cuts, weights=weights)
    return {"votes": np.asarray(votes.high, np.int64) << HALF | np.asarray(votes.low, np.int64)}


def _elected(parts: Sequence[Numbers], config: TiesConfig, found: Numbers) -> Numbers:
    """What `advance` takes: the thresholds, and whether more entries are positive."""
    negative, positive = functools.reduce(np.add, (part["votes"] for part in parts))
    return {"cuts": found["cuts"], "majority": np.asarray(negative < positive)}


# The kernel.


def ties(x: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"], density: float) -> Float[jax.Array, "*shape"]:
    """Z = TIES_p(x, y) of one pair of arrays: trim each, elect a sign for every entry, sum the entries that have it.

    Args:
      x: one operand.
      y: the other.
      density: p, share of the entries that trimming keeps; above 1 it is read as a percentage. 1 trims nothing. All
        entries as large as the threshold are kept.
    """
    return ties_at(x, y, cut_order(x.size, density))


def ties_at(
    x: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"], k: int | UInt32[Tensor, ""]
) -> Float[jax.Array, "*shape"]:
    """`ties` with the order k of the thresholds, which may be known only while the program runs."""
    xs, ys = (x[None],), (y[None],)
    return _merged(xs, ys, **_cuts_and_majority(xs, ys, k=k, weights=((1,),)))[0][0]


def cut_order(n_entries: int, density: float) -> int:
    """The place q = d − ⌊p d⌋ of the threshold among d magnitudes in rising order; 0 if nothing is trimmed."""
    # The authors' settings write 20 for 0.2; 1 is a share, so that percentages begin above it.
    return n_entries - int(n_entries * (density / 100 if density > 1 else density))


def _cuts_and_majority(
    xs: TensorStacks, ys: TensorStacks, *, k: int | UInt32[Tensor, ""], weights: Weights
) -> dict[str, Tensor]:
    """The thresholds of two models, each one vector in the eyes of threshold and election, and the sign they elect.

    Args:
      xs: one operand, a stack of tensors for every shape.
      ys: the other.
      k: place of the threshold among all entries.
      weights: how often the entries of every tensor count.
    """
    cuts = jnp.stack([kth_smallest_magnitude(stacks, k, weights) for stacks in (xs, ys)])
    votes = _votes(xs, ys, cuts, weights=weights)
    negative, positive = (jax.tree.map(lambda n, i=i: n[i], votes) for i in range(2))
    return {"cuts": cuts, "majority": is_less(negative, positive)}


# The order is static: whole numbers of a large model are beyond 32 bits.
_found = jax.jit(_cuts_and_majority, static_argnames=("k", "weights"))


@functools.partial(jax.jit, static_argnames="weights")
def _votes(xs: TensorStacks, ys: TensorStacks, cuts: Float[Tensor, "2"], *, weights: Weights) -> Count:
    """How many entries of x + y, both trimmed, are negative, and how many positive."""

    def is_negative_or_positive(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total = trim(x, cuts[0]) + trim(y, cuts[1])
        return total < 0, total > 0

    return count_entries(is_negative_or_positive, xs, ys, weights=weights)


def _merged(
    xs: TensorStacks, ys: TensorStacks, cuts: Float[Tensor, "2"], majority: Bool[Tensor, ""]
) -> tuple[jax.Array, ...]:
    """Z of two models."""
    pairs = zip(xs, ys, strict=True)
    return tuple(disjoint_sum(trim(x, cuts[0]), trim(y, cuts[1]), majority) for x, y in pairs)


def trim(x: Float[Tensor, "*shape"], cut: Float[Tensor, ""]) -> Float[Tensor, "*shape"]:
    """Sets the entries of magnitude below `cut` to zero."""
    # All that equal the threshold stay, so that the order of entries never matters.
    return jnp.where(magnitude_bits(x) >= magnitude_bits(cut), x, 0)


def disjoint_sum(
    x: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"], majority: Bool[Tensor, ""]
) -> Float[jax.Array, "*shape"]:
    """The sum of those of x and y that have the sign of x + y; where they cancel, the majority's: positive if true."""
    total = x + y
    # A sum: the mean of the original paper is not what the authors' program takes.
    is_positive = (total > 0) | ((total == 0) & majority)
    return jnp.where(is_positive, jnp.maximum(x, 0) + jnp.maximum(y, 0), jnp.minimum(x, 0) + jnp.minimum(y, 0))


RULE = Rule(
    name="ties",
    remembers=lambda config: config.variant == "text",
    config=TiesConfig,
    first=first,
    advance=advance,
    scope=every_tensor,
    update="θ + λ TIES(D, τ): of the model's largest entries of both, those of the elected sign are added",
    touches="every tensor",
    cost="order statistics of two models, O(mn)",
    source="Yadav et al., arXiv:2306.01708",
    survey=(Look(_count_halves, _narrowed), Look(_count_halves, _narrowed), Look(_vote, _elected)),
    states=2,
    workspace=2.0,
    on_matrices=False,
)
