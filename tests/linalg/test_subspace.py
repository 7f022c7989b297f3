import jax
import jax.numpy as jnp
import matrices
import numpy as np
import oracle
import pytest

from nufilt_jax.linalg import dense, directions, dispatch, subspace
from nufilt_jax.linalg.certificate import CERTIFIED_ANGLE, complete, separated, spectrum_of
from nufilt_jax.linalg.grams import gram_of
from nufilt_jax.linalg.refine import refine
from nufilt_jax.methods.stacked import group_layers

ROUTES = ["eigh", "svd", "subspace"]


@jax.jit
def gram(x):
    return dense.gram(x)


def find(x, rank, chosen):
    stacks = (jnp.asarray(x)[None],)
    call = jax.jit(subspace.leading, static_argnums=(2, 3))
    found = call(stacks, gram_of(stacks), rank, chosen)
    used = directions.rank_mask(jax.tree.map(lambda leaf: leaf[0], found), len(x))
    return found, np.asarray(used.vectors, np.float64), np.asarray(used.sizes)


@pytest.mark.parametrize("chosen", ROUTES)
@pytest.mark.parametrize("shape", [(64, 64), (64, 24), (24, 64), (1, 1), (1, 8), (8, 1)], ids=str)
@pytest.mark.parametrize("true_rank", [0, 2, None])
def test_projector(shape, true_rank, chosen):
    x = matrices.power_law(shape, seed=0, rank=true_rank, exponent=0.8)
    _, v, sizes = find(x, 6, chosen)
    p = np.eye(shape[1]) - v @ v.T
    # The routes are backward stable: the error grows with eps and shrinks with the spectrum's gap at the cut.
    tolerance = 200 * max(shape) * oracle.EPS
    np.testing.assert_allclose(p, oracle.projector(x, 6), atol=tolerance)
    np.testing.assert_allclose(p @ p, p, atol=tolerance)
    np.testing.assert_allclose(sizes, np.linalg.norm(x @ v, axis=0), atol=tolerance)


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.8, 1.2, 2.0])
def test_eigenvectors_of_the_gram_matrix_are_refined_or_replaced(exponent):
    """Whatever the spectrum: where float32 squares it out of sight, the certificate is refused."""
    rng = np.random.default_rng(0)
    x = matrices.power_law((256, 256), seed=3, exponent=exponent) if exponent else rng.normal(size=(256, 256))
    x = x.astype(np.float32)
    found, v, _ = find(x, 48, "eigh")
    s = np.linalg.svd(x.astype(float), compute_uv=False)
    rounding = oracle.EPS * s[0] / (s[47] - s[48])  # what float32 can tell at this gap
    error = np.linalg.norm(v @ v.T - (np.eye(256) - oracle.projector(x, 48)), 2)
    assert error < 2e-5 + 2 * rounding
    if exponent == 2.0:
        assert not bool(found.certified[0])
    if exponent in (0.3, 0.8):
        assert bool(found.certified[0])


def test_a_cut_within_noise_far_below_the_signal_finds_the_strongest_directions():
    """As a low-rank task vector beside small changes everywhere: neighbours at the cut are close, and far below σ_1."""
    rng = np.random.default_rng(0)
    x = 0.6 * matrices.power_law((400, 400), seed=5, rank=40, exponent=0.5) + 5e-5 * rng.normal(size=(400, 400))
    x = x.astype(np.float32)
    s = np.linalg.svd(x.astype(float), compute_uv=False)
    assert s[0] / s[63] > 10
    found, v, _ = find(x, 64, "eigh")
    kept = np.linalg.norm(x @ v, axis=0)
    assert np.sum(kept**2) == pytest.approx(np.sum(s[:64] ** 2), rel=1e-6)
    assert float(found.gap[0]) == pytest.approx((s[63] - s[64]) / s[63], abs=1e-3)
    assert np.linalg.norm(v @ v.T - (np.eye(400) - oracle.projector(x, 64)), 2) < 1e-3


def test_unrefined_eigenvectors_would_not_do():
    """The refinement earns its place: without it the same spectrum is far off."""
    x = matrices.power_law((256, 256), seed=3, exponent=1.0)
    _, vectors = jnp.linalg.eigh(gram(jnp.asarray(x)))
    v = np.asarray(vectors[:, ::-1][:, :48], np.float64)
    exact = np.eye(256) - oracle.projector(x, 48)
    assert np.linalg.norm(v @ v.T - exact, 2) > 1e-4
    _, v, _ = find(x, 48, "eigh")
    assert np.linalg.norm(v @ v.T - exact, 2) < CERTIFIED_ANGLE * 48**0.5


@pytest.mark.parametrize("rank", [8, 100])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_the_filtered_iteration_is_certified_from_flat_to_steep(rank, exponent):
    x = matrices.power_law((320, 400), seed=1, exponent=exponent) if exponent else None
    x = np.random.default_rng(1).normal(size=(320, 400)).astype(np.float32) if x is None else x
    found, v, _ = find(x, rank, "subspace")
    assert bool(found.certified[0])
    s = np.linalg.svd(x.astype(float), compute_uv=False)
    rounding = oracle.EPS * s[0] / (s[rank - 1] - s[rank])  # what float32 can tell at this gap
    error = np.linalg.norm(v @ v.T - (np.eye(400) - oracle.projector(x, rank)))
    assert error < 2**0.5 * (CERTIFIED_ANGLE * rank**0.5 + rounding)


def test_an_iteration_that_cannot_converge_falls_back():
    """At k^-2, float32 squares the wanted directions into the rounding of the strongest."""
    x = matrices.power_law((400, 300), seed=1, exponent=2.0)
    found, v, _ = find(x, 60, "subspace")
    assert not bool(found.certified[0])
    by_svd = find(x, 60, "svd")[1]
    np.testing.assert_array_equal(v, by_svd)


def blocks_of_a_matrix_of_rank_10():
    """What a certificate for 60 directions has to tell apart, by name; the first is right."""
    x = matrices.power_law((120, 150), seed=1, rank=10, exponent=0.5)
    v = np.linalg.svd(x.astype(float))[2].T
    right = v[:, :92]
    skewed, mixed = right.copy(), right.copy()
    skewed[:, 91] = 0.8 * v[:, 90] + 0.6 * v[:, 91]
    # The same span, but twice as many columns respond: the rank could not be told.
    mixed[:, :20] = right[:, :20] @ matrices.orthonormal(np.random.default_rng(0), 20, 20)
    # A null direction stands in for a strong one, and all that is there is right.
    missing = np.delete(v, 4, axis=1)[:, :92]
    return x, {"right": right, "skewed": skewed, "mixed": mixed, "missing": missing}


def refused(x, block, rank):
    """The inequalities of the certificate that do not hold."""
    found = jax.jit(refine, static_argnums=2)(jnp.asarray(x), jnp.asarray(block, jnp.float32), rank).certificate
    failed = [name for name in found._fields if not getattr(found, name)]
    assert bool(found.holds) == (not failed)
    return failed


@pytest.mark.parametrize(
    ("name", "expected"),
    [("right", []), ("skewed", ["orthonormal"]), ("mixed", ["independent"]), ("missing", ["corrected", "complete"])],
)
def test_each_wrong_block_is_refused_for_what_is_wrong_with_it(name, expected):
    x, blocks = blocks_of_a_matrix_of_rank_10()
    assert refused(x, blocks[name], 60) == expected


def test_a_null_direction_in_place_of_a_weak_one_is_no_bound_on_what_is_outside():
    """Between the 32 wanted directions and the null ones 8 are weaker: one is outside, and mixed into a wanted one."""
    x = matrices.power_law((64, 64), seed=1, rank=40, exponent=2.0)
    v = np.linalg.svd(x.astype(float))[2].T
    mixed = np.delete(v, 39, axis=1)[:, :56]
    assert refused(x, mixed, 32) == []
    mixed[:, 31] = 0.96 * v[:, 31] + 0.28 * v[:, 39]
    assert refused(x, mixed, 32) == ["corrected"]


def test_a_block_that_still_couples_is_refused():
    """With the outside alone, to which the sweeps are blind; and within, which no correction mends."""
    rng = np.random.default_rng(0)
    x = matrices.power_law((64, 64), seed=1, exponent=0.5)
    v = np.linalg.svd(x.astype(float))[2].T
    assert refused(x, v[:, :44], 20) == []
    tilted, _ = np.linalg.qr(v[:, :44] + 0.01 * rng.normal(size=(64, 44)) / 8)
    assert refused(x, tilted, 20) == ["corrected"]
    turned, _ = np.linalg.qr(v + rng.normal(size=v.shape) / 8)
    assert "separated" in refused(x, turned, 20)


@pytest.mark.parametrize(
    ("squares", "rotation", "expected"),
    [([9, 4, 1], 1.4e-5, True), ([9, 4, 1], 1.5e-5, False), ([9, 1, 4], 0, False)],
    ids=["apart", "turned too far", "wrong order"],
)
def test_separated_asks_for_the_angle_and_the_order(squares, rotation, expected):
    """√2 1e-5 and little rounding are allowed for two directions."""
    spectrum = spectrum_of(jnp.asarray(squares, jnp.float32), 2, 1e-6)
    assert bool(separated(jnp.float32(rotation), spectrum)) == expected


@pytest.mark.parametrize(
    ("squares", "energy", "expected"),
    [([9, 4, 1], 16, True), ([9, 4, 1], 16.1, False), ([9, 0, 0], 8e-12, True), ([9, 0, 0], 1e-11, False)],
    ids=["as weak", "too much", "rounding", "of a lower rank"],
)
def test_complete_asks_for_the_energy_outside(squares, energy, expected):
    """Three directions outside may have four times the energy of the last kept; of a lower rank they may have none."""
    spectrum = spectrum_of(jnp.asarray(squares, jnp.float32), 2, 1e-6)
    assert bool(complete(jnp.float32(energy), spectrum, 3, 1e-6)) == expected


def test_a_neighbour_without_certificate_changes_nothing():
    hard, easy = (matrices.power_law((300, 300), seed=1, exponent=exponent) for exponent in (2.0, 0.8))
    call = jax.jit(subspace.leading, static_argnums=(2, 3))
    both = jnp.stack([jnp.asarray(easy), jnp.asarray(hard)])
    alone = call((both[:1],), gram_of((both[:1],)), 60, "subspace")
    beside = call((both,), gram_of((both,)), 60, "subspace")
    assert beside.certified.tolist() == [True, False]
    p, q = (np.asarray(v[0] @ v[0].T) for v in (beside.vectors, alone.vectors))
    np.testing.assert_allclose(p, q, atol=1e-5)


@pytest.mark.parametrize("chosen", ROUTES)
def test_ties_at_the_cut_give_some_projector(chosen):
    """Which of equal directions is kept is arbitrary; that it is a projector of the right rank is not."""
    q = matrices.orthonormal(np.random.default_rng(0), 40, 40).astype(np.float32)
    found, v, _ = find(q, 7, chosen)
    np.testing.assert_allclose(v.T @ v, np.eye(7), atol=1e-4)
    assert float(found.gap[0]) < 1e-3


def test_gap_is_relative_to_the_last_direction_kept():
    x = np.diag(np.array([8.0, 4.0, 2.0, 1.0], np.float32))
    for chosen in ROUTES:
        assert float(find(x, 2, chosen)[0].gap[0]) == pytest.approx(0.5, abs=1e-3)
    assert float(find(x, 4, "eigh")[0].gap[0]) == 1


@pytest.mark.parametrize("chosen", ROUTES)
@pytest.mark.parametrize("rank", [64, 512], ids=["some", "all"])
def test_rank_mask_measures_instead_of_trusting_eigenvalues(rank, chosen):
    """Roots of eigenvalues of rounding noise would count null directions as used."""
    x = jnp.asarray(matrices.power_law((512, 512), seed=4, rank=5, exponent=0.3))
    values, _ = jnp.linalg.eigh(gram(x))
    roots = np.sqrt(np.maximum(np.asarray(values)[::-1], 0))
    assert (roots > roots[0] * 512 * oracle.EPS).sum() > 5
    _, masked, sizes = find(x, rank, chosen)
    assert np.sum(np.any(masked != 0, axis=0)) == np.sum(sizes > 0) == 5


def test_after_changes_nothing_but_the_order():
    x = jnp.asarray([1.5, -2.0, 0.0])
    for done in (jnp.ones((2, 2)), jnp.asarray([jnp.nan]), jnp.asarray([jnp.inf]), jnp.zeros((0, 3))):
        np.testing.assert_array_equal(jax.jit(dispatch.after)(x, done), x)


def test_groups_do_not_depend_on_the_order_of_names():
    shapes = {"b": (4, 2), "a": (4, 2), "c": (2, 2), "d": (2, 4)}
    assert group_layers(shapes) == group_layers(dict(reversed(shapes.items())))
