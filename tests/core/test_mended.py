"""The program that always runs, and the second one for layers without a certificate, which hardly ever does."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import nufilt_jax as nj
from nufilt_jax import methods
from nufilt_jax.core import layers as door
from nufilt_jax.core import solve
from nufilt_jax.methods import nufilt
from nufilt_jax.methods.null_space import NullSpaceConfig

N, RANK = 32, 8
CONFIG = nj.NufiltConfig(filter_rank=RANK, adapter_rank=2, task_rank=2, steps=3)
SPECTRA = {
    "easy": np.arange(1, N + 1) ** -0.6,
    "steep": np.arange(1, N + 1) ** -1.5,
    "flat": np.ones(N),
    "nearly flat": 1 - 1e-6 * np.arange(N),
    "rank-deficient": np.where(np.arange(N) < 5, 0.5 ** np.arange(N), 0),
    "zero": np.zeros(N),
}
EASY = ("easy", "steep", "rank-deficient", "zero")


def layers(*kinds, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for kind in kinds:
        u, v = (np.linalg.qr(rng.standard_normal((N, N)))[0] for _ in range(2))
        found.append((u * SPECTRA[kind]) @ v.T)
    return jnp.asarray(np.stack(found), jnp.float32)


def solved(d, tau, config=CONFIG):
    start = np.random.default_rng(1).normal(0, 0.02, (len(d), config.trained_rank, N)).astype(np.float32)
    return nj.solve_stack(d, tau, config=config, adapter_init=jnp.asarray(start)), start


@pytest.mark.parametrize("kind", EASY)
def test_easy_layers_never_compile_the_second_program(kind):
    door._solve_group.clear_cache()
    found, _ = solved(layers(kind, kind), layers("easy", "easy", seed=2))
    assert bool(found.ok.all()) and door._solve_group._cache_size() == 1


@pytest.mark.parametrize("kind", ["flat", "nearly flat"])
def test_a_hard_layer_compiles_it_and_its_neighbours_stay_as_they_were(kind):
    tau = layers("easy", "easy", "easy", seed=2)
    door._solve_group.clear_cache()
    easy, _ = solved(layers("easy", "easy", "easy"), tau)
    assert door._solve_group._cache_size() == 1
    d = layers("easy", "easy", "easy")
    d = d.at[1].set(layers(kind)[0])
    found, start = solved(d, tau)
    assert bool(found.ok.all()) and door._solve_group._cache_size() == 2
    for i in (0, 2):
        np.testing.assert_array_equal(found.update[i], easy.update[i])
    alone = jax.jit(solve.solve_group, static_argnames=("add", "until_certified"))(
        (d[1:2],), (tau[1:2],), jnp.asarray(start[1:2]), config=CONFIG
    )
    np.testing.assert_allclose(found.update[1], alone.updates[0][0], atol=1e-6)
    assert not bool(alone.forecast.certified[0])


def test_a_hard_layer_is_solved_alone():
    """Whatever other layers are hard: a model cut into windows has the bits of the whole."""
    tau = layers("easy", "easy", "easy", "easy", seed=2)
    one, other = (layers("easy", "flat", kind, "easy") for kind in ("easy", "nearly flat"))
    found = [solved(d.at[:2].set(one[:2]), tau)[0] for d in (one, other)]
    np.testing.assert_array_equal(found[0].update[1], found[1].update[1])
    assert not np.array_equal(found[0].update[2], found[1].update[2])


def test_a_merge_solves_hard_layers_from_the_d_before():
    """Where D is overwritten in place, a layer without a certificate is left as it was until it is solved again."""
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]
    base = {name: np.zeros((N, N), np.float32) for name in names}
    first, second = (dict(zip(names, np.asarray(layers(*kinds, seed=s)), strict=True)) for kinds, s in (
        (("easy", "flat", "easy"), 0), (("easy", "easy", "easy"), 2)))  # fmt: skip
    rule = methods.get("null_space", NullSpaceConfig(filter_rank=RANK))
    nufilt._step.clear_cache()
    state = rule.update(rule.init(base), first)
    state = rule.update(state, second, donate=True)
    assert [bool(row.forecast.certified) for row in state.report.values()] == [True, False, True]
    assert nufilt._step._cache_size() == 2
    for name, hard in zip(names, (False, True, False), strict=True):
        update = np.asarray(state.delta[name], np.float64) - first[name]
        # All directions of a flat D are alike: what is filtered is a projection of rank 8, and no more is known.
        p = np.linalg.lstsq(second[name].astype(np.float64), update, rcond=None)[0]
        np.testing.assert_allclose(p @ p, p, atol=2e-4)
        assert round(np.trace(p)) == N - RANK
        if not hard:
            v2 = oracle.leading(first[name], RANK)
            np.testing.assert_allclose(update @ v2, 0, atol=1e-5)
