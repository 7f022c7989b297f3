"""Order statistics of a whole model, exact and without ever making one vector of it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int64, UInt32

from nufilt_jax.methods.stacked import Tensor, TensorStacks

Weights = tuple[tuple[int, ...], ...]

HALF = 16  # bits of half a number
_PIECE = 1 << 18  # numbers looked at together by `half_counts`: they stay in the cache

# Bits of the answer found in one pass over the model. 2 is the fastest on CPU: with 1 the compiler writes down what it
# compares, with 4 the many comparisons take longer than the reading.
_BITS = 2


class Count(NamedTuple):
    """Non-negative whole numbers up to 2⁴⁸ as high·2¹⁶ + low: models have more entries than 32 bits can count."""

    high: UInt32[Tensor, "..."]
    low: UInt32[Tensor, "..."]


def is_less(a: Count, b: Count) -> Bool[Tensor, "..."]:
    """Whether a < b."""
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def count_entries(
    tests: Callable[..., tuple[Bool[Tensor, "..."], ...]], *operands: TensorStacks, weights: Weights | None = None
) -> Count:
    """How many entries of a model pass each of several tests.

    Args:
      tests: of entries with the same place in each operand; element by element.
      *operands: each has a stack of tensors for every shape, with a leading axis over the tensors. A tensor has fewer
        than 2³² entries.
      weights: how often every tensor of every stack counts, in all fewer than 2¹⁶ per stack; None for once.

    Returns:
      One number per test.
    """
    total = Count(jnp.uint32(0), jnp.uint32(0))
    for index, parts in enumerate(zip(*operands, strict=True)):
        repeats = np.asarray(weights[index] if weights else [1] * len(parts[0]), np.uint32)[:, None]
        passed = _count_each(tests, parts)
        low = total.low + jnp.sum((passed & (2**HALF - 1)) * repeats, axis=0, dtype=jnp.uint32)
        high = total.high + jnp.sum((passed >> HALF) * repeats, axis=0, dtype=jnp.uint32)
        total = Count(high + (low >> HALF), low & (2**HALF - 1))
    return total


def _count_each(tests: Callable[..., tuple], parts: tuple) -> UInt32[Tensor, "tensors tests"]:
    """The counts of every tensor of a stack; one after another, so that what the tests compute stays small."""

    def of_tensor(tensors: tuple) -> UInt32[Tensor, " tests"]:
        passed = [test.astype(jnp.uint32) for test in tests(*tensors)]
        # One reduction for all tests reads the tensor once; row by row it is the fastest.
        add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))  # noqa: E731
        rows = jax.lax.reduce(tuple(passed), (np.uint32(0),) * len(passed), add, (1,))
        return jnp.stack([jnp.sum(row, dtype=jnp.uint32) for row in rows])

    return jax.lax.map(of_tensor, tuple(_as_matrices(part) for part in parts))


def _as_matrices(stack: Float[Tensor, "tensors ..."]) -> Float[Tensor, "tensors rows columns"]:
    return stack.reshape(len(stack), -1, stack.shape[-1] if stack.ndim > 1 else 1)


def kth_smallest_magnitude(
    stacks: TensorStacks, k: int | UInt32[Tensor, ""], weights: Weights | None = None
) -> Float[Tensor, ""]:
    """The k-th smallest |x| of all entries of a model.

    The bits of a magnitude, read as a whole number, are ordered like the magnitudes. The answer's bits are found from
    the top: each pass over the model counts the entries below the three numbers that differ in the next two bits.

    Args:
      stacks: float32 and finite.
      k: from 1 to the number of entries, by weight; 0 gives 0. An array if it is known only while the program runs.
      weights: as in `count_entries`; an entry of weight w is w entries.

    Returns:
      The magnitude, bit by bit that of an entry.
    """
    wanted = Count(jnp.uint32(k >> HALF), jnp.uint32(k & (2**HALF - 1)))

    def narrow(step: Tensor, found: UInt32[Tensor, ""]) -> UInt32[Tensor, ""]:
        shift = jnp.uint32(32 - _BITS) - _BITS * jnp.asarray(step, jnp.uint32)
        bounds = [found + (jnp.uint32(digit) << shift) for digit in range(1, 2**_BITS)]
        below = count_entries(lambda x: tuple(magnitude_bits(x) < bound for bound in bounds), stacks, weights=weights)
        return found + (jnp.sum(is_less(below, wanted), dtype=jnp.uint32) << shift)

    bits = jax.lax.fori_loop(0, 32 // _BITS, narrow, jnp.uint32(0))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def half_counts(stacks: TensorStacks, weights: Weights, upper: int | None = None) -> Int64[np.ndarray, "values"]:
    """How many magnitudes have each of the values that half of their bits can take; on the host.

    The order statistics of a model of which only parts are at hand: counts add up, `place_in` reads them.

    Args:
      stacks: float32 and finite.
      weights: as in `count_entries`.
      upper: looks at the lower halves of those that have this upper half; None looks at all upper halves.
    """
    counts = np.zeros(2**HALF, np.int64)
    for stack, copies in zip(stacks, weights, strict=True):
        for tensor, copy in zip(np.asarray(stack), copies, strict=True):
            flat = tensor.reshape(-1).view(np.uint32)
            for start in range(0, flat.size, _PIECE):
                bits = flat[start : start + _PIECE] & np.uint32(2**31 - 1)
                halves = bits >> HALF
                values = halves if upper is None else bits[halves == upper] & np.uint32(2**HALF - 1)
                counts += copy * np.bincount(values, minlength=2**HALF)
    return counts


def place_in(counts: Int64[np.ndarray, "values"], k: int) -> tuple[int, int]:
    """The value of the k-th smallest number, and its place among those of this value; 0 and 0 if k is 0."""
    up_to = np.cumsum(counts)
    value = int(np.searchsorted(up_to, k))
    return value, k - int(up_to[value - 1] if value else 0)


def magnitude_bits(x: Float[Tensor, "*shape"]) -> UInt32[Tensor, "*shape"]:
    """The bits of |x|: ordered like |x|, also where a processor takes very small numbers for zero."""
    return jax.lax.bitcast_convert_type(jnp.abs(x), jnp.uint32)
