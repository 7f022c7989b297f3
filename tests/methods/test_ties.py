import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle_ties as oracle
import pytest

from nufilt_jax import methods
from nufilt_jax.methods import ties as rule_file
from nufilt_jax.methods.order import kth_smallest_magnitude
from nufilt_jax.methods.ties import TiesConfig, cut_order, ties, ties_at

EPS = np.finfo(np.float32).eps
BLOCK = "encoder.block.0.layer.{}"
SHAPES = {
    "shared.weight": (20, 8),
    "lm_head.weight": (20, 8),  # of the embedding's shape: one stack, two weights
    BLOCK.format("0.SelfAttention.q.weight"): (8, 8),
    BLOCK.format("0.SelfAttention.relative_attention_bias.weight"): (6, 2),
    BLOCK.format("0.layer_norm.weight"): (8,),
    BLOCK.format("1.DenseReluDense.wo.weight"): (8, 16),
    "patch.weight": (4, 3, 2, 2),
    "gate": (1, 8),
}
BASE = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}  # zero: θ_t is τ_t, to the last bit
NORM, HEAD = BLOCK.format("0.layer_norm.weight"), "lm_head.weight"


def task(seed, scale=0.01):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def steps(config, tasks):
    """The states after each task."""
    rule = methods.get("ties", config)
    states = [rule.init(BASE)]
    for each in tasks:
        states.append(rule.update(states[-1], each))
    return states


def flat(model):
    return np.concatenate([np.asarray(model[name]).ravel() for name in SHAPES])


# The kernel

at = jax.jit(ties_at)


def kernel(x, y, density):
    return at(x, y, jnp.uint32(cut_order(x.size, density)))


def pair(kind, shape=(9, 7)):
    rng = np.random.default_rng(5)
    if kind == "distinct":
        return tuple(rng.normal(size=shape).astype(np.float32) for _ in range(2))
    # Whole numbers: many ties with the threshold, many exact cancellations, either or no sign in the majority.
    low, high = {"positive": (-2, 4), "negative": (-4, 2), "even": (-3, 3)}[kind]
    x, y = (rng.integers(low, high, size=shape, endpoint=True).astype(np.float32) for _ in range(2))
    if kind == "even":
        half = len(x.ravel()) // 2
        x.ravel()[half : 2 * half], y.ravel()[half : 2 * half] = -x.ravel()[:half], -y.ravel()[:half]
        x.ravel()[2 * half :] = y.ravel()[2 * half :] = 0
    return x, y


@pytest.mark.parametrize("density", [0, 0.05, 0.2, 0.5, 0.99, 1, 20, 100])
@pytest.mark.parametrize("kind", ["distinct", "positive", "negative", "even"])
def test_kernel(kind, density):
    x, y = pair(kind)
    want = oracle.kernel(x.ravel(), y.ravel(), density).reshape(x.shape)
    np.testing.assert_allclose(kernel(x, y, density), want, rtol=EPS, atol=0)  # one addition, rounded once


@pytest.mark.parametrize(("kind", "sign"), [("positive", 1), ("negative", -1), ("even", 0)])
def test_the_pairs_above_cancel_and_have_the_majority_they_are_named_after(kind, sign):
    x, y = pair(kind)
    assert np.sum((x == -y) & (x != 0)) > 2
    assert np.sign(np.sum(np.sign(x + y))) == sign


@pytest.mark.parametrize(("n", "density"), [(100, 0.2), (101, 0.2), (63, 0.33), (7, 0.1)])
def test_one_more_than_the_share_is_kept(n, density):
    y = np.random.default_rng(n).permutation(np.arange(1, n + 1)).astype(np.float32)
    kept = np.asarray(kernel(np.zeros_like(y), y, density))
    assert np.count_nonzero(kept) == int(np.floor(density * n)) + 1
    np.testing.assert_array_equal(kept, oracle.trim(y, density))


def test_symmetries_of_the_kernel():
    x, y = pair("distinct")
    z = kernel(x, y, 0.3)
    np.testing.assert_array_equal(kernel(y, x, 0.3), z)
    np.testing.assert_array_equal(kernel(-x, -y, 0.3), -z)
    np.testing.assert_array_equal(kernel(4 * x, 4 * y, 0.3), 4 * z)
    np.testing.assert_allclose(kernel(3 * x, 3 * y, 0.3), 3 * z, rtol=4 * EPS)
    np.testing.assert_array_equal(kernel(x, x, 0.3), 2 * oracle.trim(x.ravel(), 0.3).reshape(x.shape))


def test_of_all_equal_and_of_zero_magnitudes_nothing_is_trimmed():
    zero, sign = np.zeros((3, 4), np.float32), np.resize(np.float32([1, -1, 1]), (3, 4))
    np.testing.assert_array_equal(kernel(zero, sign, 0.2), sign)
    sparse = zero + np.float32([0, 0, 0, 5])
    np.testing.assert_array_equal(kernel(sparse, zero, 0.5), sparse)


@pytest.mark.parametrize("sign", [1, -1])
def test_trimmed_entries_do_not_vote(sign):
    """Three large entries of one sign outvote twelve small ones of the other, which are trimmed."""
    x = sign * np.float32([5, 5, 5, 4, *[-1] * 12])
    y = sign * np.float32([5, 5, 5, -4, *[-1] * 12])
    np.testing.assert_array_equal(kernel(x, y, 0.2), sign * np.float32([10, 10, 10, 4, *[0] * 12]))


def test_layers_of_a_batch_have_thresholds_and_majorities_of_their_own():
    pairs = [pair(kind) for kind in ("distinct", "positive", "negative", "even")]
    x, y = (np.stack(part) for part in zip(*pairs, strict=True))
    x[0] *= 1000
    batch = jax.jit(jax.vmap(functools.partial(ties, density=0.3)))(x, y)
    for got, a, b in zip(batch, x, y, strict=True):
        np.testing.assert_array_equal(got, kernel(a, b, 0.3))


def test_a_threshold_known_only_at_run_time():
    """Rows of zeros that do not count, as a layer of lower rank has: the order is then beyond them."""
    x, y = (np.concatenate([part, np.zeros((3, 7), np.float32)]) for part in pair("distinct"))
    z = at(x, y, jnp.uint32(3 * 7 + cut_order(9 * 7, 0.2)))
    np.testing.assert_array_equal(z[:9], kernel(x[:9], y[:9], 0.2))
    np.testing.assert_array_equal(z[9:], 0)


# The method


@pytest.mark.parametrize("merge_first", [True, False])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("variant", ["code", "text"])
def test_every_step_is_the_oracles(variant, copies, merge_first):
    """Each step from the state before it, so that rounding never moves an entry over the threshold."""
    config = TiesConfig(scale=0.3, density=0.2, variant=variant, embedding_copies=copies, merge_first=merge_first)
    tasks = [task(seed) for seed in range(3)] + [BASE, task(4, scale=0.1)]
    states = steps(config, tasks)
    output = tasks[0] if merge_first else BASE
    want = oracle.add(BASE, output, 0.3, copies)
    chex.assert_trees_all_close(dict(states[1].delta), want, rtol=4 * EPS)
    for before, after, tau in zip(states[1:], states[2:], tasks[1:], strict=False):
        operand = dict(before.delta) if variant == "code" else output
        output = oracle.model_kernel(jax.tree.map(np.asarray, operand), tau, 0.2, copies)
        want = oracle.add(jax.tree.map(np.asarray, dict(before.delta)), output, 0.3, copies)
        # Two products and two sums, of terms up to c λ times as large as their sum.
        chex.assert_trees_all_close(dict(after.delta), want, rtol=4 * EPS, atol=8 * EPS * np.abs(flat(want)).max())
        output = {name: x.astype(np.float32) for name, x in output.items()}


@pytest.mark.parametrize("variant", ["code", "text"])
def test_equal_tasks_have_a_closed_form(variant):
    """Code: ((1+λ)^T − 1) τ on the top set. Text: the operand doubles less: Z_t = Z_{t−1} + τ there, so t τ."""
    tau, scale, n = task(7), 0.3, 5
    state = steps(TiesConfig(scale=scale, variant=variant), [tau] * n)[-1]
    vector = flat(tau)
    is_kept = oracle.trim(vector, 0.2) != 0
    factor = (1 + scale) ** n - 1 if variant == "code" else scale * sum(range(1, n + 1))
    want = np.where(is_kept, factor, scale) * vector
    np.testing.assert_allclose(flat(state.delta), want, rtol=4 * n * EPS)


def test_the_threshold_is_the_models_and_not_a_tensors():
    first, second = task(0), task(1)
    for each in (first, second):
        each[HEAD] *= np.float32(1e-3)
    states = steps(TiesConfig(), [first, second])
    np.testing.assert_array_equal(states[2].delta[HEAD], states[1].delta[HEAD])
    changed = sum(np.count_nonzero(states[2].delta[name] != states[1].delta[name]) for name in SHAPES)
    n_kept = int(0.2 * sum(x.size for x in BASE.values())) + 1
    assert n_kept <= changed <= 2 * n_kept


@pytest.mark.parametrize("sign", [1, -1])
def test_cancelling_entries_follow_the_whole_models_majority(sign):
    """In q all entries cancel; the sign of what is added there is that of all the other tensors."""
    q = BLOCK.format("0.SelfAttention.q.weight")
    first = {name: np.full(shape, sign, np.float32) for name, shape in SHAPES.items()}
    second = first | {q: -first[q]}
    states = steps(TiesConfig(scale=1.0), [first, second])
    np.testing.assert_array_equal(states[2].delta[q] - states[1].delta[q], np.full((8, 8), sign))


def test_the_embeddings_copies_have_votes():
    """The embedding is positive, all else cancels or is negative: once counted it loses, three times it wins."""
    negative = np.full(SHAPES[HEAD], -1, np.float32)
    more = BLOCK.format("1.DenseReluDense.wo.weight")
    first = BASE | {"shared.weight": -negative, HEAD: negative, more: -np.ones((8, 16), np.float32)}
    first |= {"gate": np.ones((1, 8), np.float32)}
    second = first | {"gate": -first["gate"]}
    for copies, winner in ((1, -1), (3, 1)):
        config = TiesConfig(scale=1.0, density=1, embedding_copies=copies)
        states = steps(config, [{**first, "shared.weight": first["shared.weight"] / copies}, second])
        np.testing.assert_array_equal(states[2].delta["gate"] - states[1].delta["gate"], np.full((1, 8), winner))


def test_the_first_task_may_be_left_out():
    config = TiesConfig(scale=0.5, merge_first=False, embedding_copies=3)
    tasks = [task(0), task(1)]
    for variant in ("code", "text"):
        states = steps(TiesConfig(**{**vars(config), "variant": variant}), tasks)
        assert not flat(states[1].merged).any()
        order = [name for name in SHAPES for _ in range(3 if name == "shared.weight" else 1)]
        cut = sorted(abs(np.concatenate([tasks[1][name].ravel() for name in order])))
        cut = cut[len(cut) - int(0.2 * len(cut)) - 1]
        for name in SHAPES:
            gain = 1.5 if name == "shared.weight" else 0.5
            want = np.where(np.abs(tasks[1][name]) >= cut, gain * tasks[1][name], 0)
            np.testing.assert_allclose(states[2].delta[name], want, rtol=2 * EPS)


@pytest.mark.parametrize("variant", ["code", "text"])
def test_nothing_but_the_tensor_that_differs_moves(variant):
    for name in SHAPES:
        changed = [BASE | {name: task(seed)[name]} for seed in range(3)]
        state = steps(TiesConfig(variant=variant), changed)[-1]
        assert {key for key in SHAPES if np.any(state.merged[key] != 0)} == {name}


@pytest.mark.parametrize("variant", ["code", "text"])
def test_a_state_that_went_through_files_continues_alike(variant):
    config = TiesConfig(variant=variant)
    for state in steps(config, [task(0), task(1)])[1:]:
        assert bool(state.extra) == (variant == "text")
        leaves, structure = jax.tree.flatten(state)
        restored = jax.tree.unflatten(structure, [np.array(x) for x in leaves])
        rule = methods.get("ties", config)
        straight, again = rule.update(state, task(2)), rule.update(restored, task(2))
        chex.assert_trees_all_equal(straight.merged, again.merged)
        chex.assert_trees_all_equal(straight.extra, again.extra)
        chex.assert_trees_all_equal(jax.tree.leaves(state), leaves)


@pytest.mark.parametrize("variant", ["code", "text"])
def test_the_second_task_compiles_nothing(variant):
    rule = methods.get("ties", TiesConfig(variant=variant, scale=0.7))
    state = rule.update(rule.update(rule.init(BASE), task(0)), task(1))
    programs = (rule_file._step, rule_file._add, rule_file._found)
    before = [program._cache_size() for program in programs]
    rule.update(rule.update(state, task(2)), task(3))
    assert [program._cache_size() for program in programs] == before


def test_a_step_takes_the_memory_of_d_and_little_else():
    stacks = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(16, 128, 128), (8, 256, 128), (20, 128)])
    size, weights = sum(4 * np.prod(x.shape) for x in stacks), tuple((1,) * x.shape[0] for x in stacks)
    scale, cuts, sign = (jax.ShapeDtypeStruct(shape, kind) for shape, kind in [((), "f4"), ((2,), "f4"), ((), "?")])
    found = rule_file._found.lower(stacks, stacks, k=9, weights=weights).compile()
    program = rule_file._step.lower(stacks, (), stacks, cuts, sign, scale, weights=weights).compile()
    assert program.memory_analysis().alias_size_in_bytes == size
    for each in (found, program):
        assert each.memory_analysis().temp_size_in_bytes < size / 16


def test_the_models_threshold_is_that_of_one_flat_vector():
    """The rule's own threshold against a flat sort of 10⁵ numbers."""
    rng = np.random.default_rng(8)
    stacks = tuple(rng.normal(size=shape).astype(np.float32) for shape in [(4, 100, 200), (3, 999), (2, 64, 64)])
    ordered = np.sort(np.abs(np.concatenate([x.ravel() for x in stacks])))
    k = cut_order(len(ordered), 0.2)
    assert len(ordered) - k == int(0.2 * len(ordered))
    assert float(jax.jit(functools.partial(kth_smallest_magnitude, k=k))(stacks)) == ordered[k - 1]
