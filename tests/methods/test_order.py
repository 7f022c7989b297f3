import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nufilt_jax.methods.order import HALF, Count, count_entries, half_counts, is_less, kth_smallest_magnitude, place_in

find = jax.jit(kth_smallest_magnitude, static_argnames="weights")

SHAPES = [(2, 6, 5), (3, 7), (2, 3, 2, 2, 2), (4,), (1, 1, 9)]


def model(seed, draw=None):
    """Stacks of matrices, vectors, a convolution's tensors and scalars."""
    rng = np.random.default_rng(seed)
    draw = draw or (lambda shape: rng.normal(size=shape))
    return tuple(draw(shape).astype(np.float32) for shape in SHAPES)


def oracle(stacks, k, weights=None):
    """The first magnitude, in rising order, below or at which there are k entries."""
    weights = weights or [[1] * len(stack) for stack in stacks]
    entries = []
    for stack, copies in zip(stacks, weights, strict=True):
        for tensor, copy in zip(stack, copies, strict=True):
            entries += [(abs(float(x)), int(copy)) for x in tensor.ravel()]
    seen = 0
    for magnitude, copy in sorted(entries):
        seen += copy
        if seen >= k:
            return magnitude
    raise IndexError(k)


def extremes(shape):
    """Magnitudes over the whole range, subnormal numbers, both zeros and many repetitions among them."""
    rng = np.random.default_rng(1)
    wide = np.float32(2.0) ** rng.integers(-149, 128, size=shape).astype(np.float32)
    values = np.where(rng.random(shape) < 0.6, wide, rng.integers(-2, 3, size=shape) * np.float32(1))
    return values * rng.choice([-1, 1], size=shape).astype(np.float32)


@pytest.mark.parametrize("draw", [None, extremes], ids=["normal", "extremes"])
def test_every_order_statistic(draw):
    stacks = model(0, draw)
    for k in range(1, sum(x.size for x in stacks) + 1):
        got = np.asarray(find(stacks, jnp.uint32(k)))
        assert got.view(np.uint32) == np.float32(oracle(stacks, k)).view(np.uint32)


@pytest.mark.parametrize("k", [0, 1, 66, 133])
def test_the_order_may_be_static_or_an_array(k):
    stacks = model(2)
    want = oracle(stacks, k) if k else 0.0
    static = jax.jit(functools.partial(kth_smallest_magnitude, k=k))
    assert float(static(stacks)) == float(find(stacks, jnp.uint32(k))) == want


def test_tensors_count_by_their_weight():
    stacks, rng = model(3), np.random.default_rng(0)
    weights = tuple(tuple(rng.integers(1, 5, size=len(x)).tolist()) for x in stacks)
    assert len({copies for row in weights for copies in row}) > 1
    total = sum(copies * x[0].size for row, x in zip(weights, stacks, strict=True) for copies in row)
    for k in range(1, total + 1, 7):
        assert float(find(stacks, jnp.uint32(k), weights)) == oracle(stacks, k, weights)


def test_more_entries_than_32_bits_count():
    """Thirty thousand copies of each of a few thousand entries: 6 · 10⁹ and more, as in a language model."""
    rng = np.random.default_rng(4)
    stacks = tuple(rng.normal(size=shape).astype(np.float32) for shape in [(2, 300, 100), (1, 70, 1000)])
    weights = ((30_001, 20_011), (60_013,))
    total = sum(c * x[0].size for row, x in zip(weights, stacks, strict=True) for c in row)
    assert total > 5e9
    for k in (2**32 - 1, 2**32 + 1, total - int(0.2 * total), total):
        static = jax.jit(functools.partial(kth_smallest_magnitude, k=k, weights=weights))
        assert float(static(stacks)) == oracle(stacks, k, weights)


def test_entries_are_counted_across_operands():
    xs, ys = model(5), model(6)
    both = jax.jit(functools.partial(count_entries, lambda x, y: (x < y, x * y > 0)))(xs, ys)
    assert both.high.tolist() == [0, 0]
    pairs = list(zip(xs, ys, strict=True))
    assert both.low.tolist() == [sum(np.sum(x < y) for x, y in pairs), sum(np.sum(x * y > 0) for x, y in pairs)]


def test_counts_are_ordered_by_both_halves():
    values = [0, 1, 65535, 65536, 65537, 2**33, 2**33 + 65535, 2**34 - 1]
    counts = [Count(jnp.uint32(v >> 16), jnp.uint32(v & 65535)) for v in values]
    table = [[bool(is_less(a, b)) for b in counts] for a in counts]
    assert table == [[a < b for b in values] for a in values]


def test_a_batch_has_an_order_statistic_each():
    x = np.random.default_rng(7).normal(size=(5, 8, 6)).astype(np.float32)
    x[2] *= 1000
    each = jax.jit(jax.vmap(lambda layer, k: kth_smallest_magnitude((layer[None],), k)))
    got = each(x, jnp.arange(9, 14, dtype=jnp.uint32))
    assert got.tolist() == [oracle((layer[None],), k) for layer, k in zip(x, range(9, 14), strict=True)]


def test_nothing_of_the_models_size_is_made():
    stacks = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(16, 128, 128), (8, 256, 128)])
    program = jax.jit(lambda s: kth_smallest_magnitude(s, 1000)).lower(stacks).compile()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 128 * 128 * 4 < memory.argument_size_in_bytes / 16


def by_halves(parts, weights, k):
    """The bits of the k-th smallest magnitude of a model in parts, from two looks at each."""
    pairs = list(zip(parts, weights, strict=True))
    upper, place = place_in(sum(half_counts(*pair) for pair in pairs), k)
    lower, _ = place_in(sum(half_counts(*pair, upper) for pair in pairs), place)
    return upper << HALF | lower


@pytest.mark.parametrize(
    "draw",
    [None, extremes, np.zeros, np.ones, lambda shape: np.resize([1e-45, -0.0, -1e-45, 2.0, -2.0], shape)],
    ids=["normal", "extremes", "zeros", "equal", "few values"],
)
def test_looks_at_parts_find_the_same_bits(draw):
    stacks = model(9, draw)
    weights = tuple((1,) * len(x) if i else (3,) * len(x) for i, x in enumerate(stacks))
    parts, theirs = (stacks[:1], (), stacks[1:]), (weights[:1], (), weights[1:])
    total = sum(copies[0] * x.size for copies, x in zip(weights, stacks, strict=True))
    for k in range(total + 1):
        assert by_halves(parts, theirs, k) == int(np.asarray(find(stacks, jnp.uint32(k), weights)).view(np.uint32))
