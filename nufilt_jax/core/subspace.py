"""Leading right singular vectors: what the merged model uses (V2) and what the new task needs (V1).

Only the leading few of n directions are ever used, so no route here computes left factors it does not need:

- `eigh`: eigenvectors of the Gram matrix XᵀX, refined against X. The default for V2.
- `svd`: the reference, several times slower on CPU.
- `subspace`: block power iteration with Rayleigh-Ritz. The default for V1 in layers wider than `SMALL_WIDTH`.

`eigh` and `subspace` are certified layer by layer, from what is left of the coupling or the residual; a layer
without a certificate takes the SVD.

On CPU, LAPACK calls of XLA must never overlap: as many in flight as the pool has workers, and none ever
returns. Every function here is therefore written for a whole batch, one call at a time, and takes what it has to
wait for as data (`after`). `jax.lax.optimization_barrier` is no help: the CPU compiler drops it.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nufilt_jax.config import Decomposition

# Up to this many inputs a full decomposition costs less than the iteration's overhead.
SMALL_WIDTH = 256
# Most matrices in one LAPACK call: large batches have corrupted the heap on many cores (jax issue 39292).
LAPACK_BATCH = 64
# Passes of the block power iteration.
POWER_PASSES = 24
# Sweeps of the refinement of eigenvectors.
REFINE_SWEEPS = 3
# Directions on either side of the cut that each sweep sorts out exactly.
CUT_WINDOW = 32
# Rotations of one sweep together: more would leave the vectors far from orthonormal.
MOST_ROTATION = 0.5
# Largest angle between certified and true directions, next to what float32 rounding makes of any route.
CERTIFIED_ANGLE = 2e-5
# Above this no gap is small enough to excuse it: the SVD decides.
WORST_ANGLE = 1e-2


Stacks = tuple[Float[Array, "_ _ n"], ...]  # matrices of one width, a stack per shape


class Directions(NamedTuple):
    """Leading right singular vectors of a batch of matrices.

    Attributes:
      vectors: orthonormal columns, the strongest first.
      gap: relative distance of the last singular value kept to the next one. Near 0 the cut falls among equals
        and which directions are kept is arbitrary.
      certified: false where the route in hand gave no certificate and the SVD took over.
    """

    vectors: Float[Array, "layers n k"]
    gap: Float[Array, " layers"]
    certified: Bool[Array, " layers"]


def bounds(stacks: Stacks) -> list[tuple[int, int]]:
    """Where each stack's layers begin and end in the concatenation of all."""
    return list(itertools.pairwise(itertools.accumulate((len(stack) for stack in stacks), initial=0)))


def matmul(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """Matrix product in full float32: accelerators would otherwise round to TF32 or bfloat16."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def gram(x: Float[Array, "m n"]) -> Float[Array, "n n"]:
    """XᵀX."""
    return matmul(x.T, x)


def after(x: Float[Array, "..."], done: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, unchanged, but not available before `done` is: a dependence that no compiler pass removes."""
    if done.size == 0:
        return x
    probe = jnp.ravel(done)[-1]  # of a concatenation the last part: the compiler looks through to it alone
    return x + jnp.where(jnp.isfinite(probe), jnp.minimum(jnp.abs(probe), 0), 0).astype(x.dtype)


def leading(stacks: Stacks, grams: Sequence[Array], rank: int, chosen: Decomposition) -> Directions:
    """Leading right singular vectors of every matrix in stacks of one width n.

    Args:
      stacks: the matrices X.
      grams: XᵀX, stack by stack, [layers, n, n]; not used by `svd`.
      rank: how many vectors; at most n come out.
      chosen: `eigh`, `svd` or `subspace`, from `route`.
    """
    if rank == 0:
        n_layers, width = sum(len(x) for x in stacks), stacks[0].shape[-1]
        return Directions(
            jnp.zeros((n_layers, width, 0), stacks[0].dtype), jnp.ones(n_layers), jnp.ones(n_layers, bool)
        )
    if chosen == "svd":
        return leading_by_svd(stacks, rank)
    if chosen == "eigh":
        return leading_by_eigh(stacks, jnp.concatenate(grams), rank)
    return leading_by_iteration(stacks, jnp.concatenate(grams), rank)


def leading_by_svd(stacks: Stacks, rank: int) -> Directions:
    """Reference route: thin SVDs of the matrices themselves, one stack after another."""

    def thin(x: Float[Array, "layers m n"], _: int, __: int) -> Directions:
        _u, s, vt = jnp.linalg.svd(x, full_matrices=False)
        leading = jnp.swapaxes(vt[:, :rank], 1, 2)
        # With fewer outputs than directions the rest stays zero: it is unused by definition.
        vectors = jnp.pad(leading, ((0, 0), (0, 0), (0, min(rank, x.shape[2]) - leading.shape[2])))
        return Directions(vectors, relative_gap(s, rank), jnp.ones(len(x), bool))

    return _in_turn(thin, stacks)


def leading_by_eigh(stacks: Stacks, grams: Float[Array, "layers n n"], rank: int) -> Directions:
    """Default route for V2: eigenvectors of the Gram matrices, refined against the matrices and certified."""
    n_layers, n, _ = grams.shape
    if n_layers > LAPACK_BATCH:
        values, vectors = jax.lax.platform_dependent(
            grams,
            # One by one: with a batch_size, the remainder would be a second LAPACK call beside the loop.
            cpu=lambda g: tuple(jax.lax.map(jnp.linalg.eigh, g)),
            default=lambda g: tuple(jnp.linalg.eigh(g)),
        )
    else:
        values, vectors = jnp.linalg.eigh(grams)
    vectors = vectors[:, :, ::-1]
    s = jnp.sqrt(jnp.maximum(values[:, ::-1], 0))
    if rank >= n:
        return Directions(vectors, relative_gap(s, rank), jnp.ones(n_layers, bool))

    def refined(x: Float[Array, "layers m n"], i: int, j: int) -> Directions:
        return Directions(*jax.vmap(lambda x, v: refine(x, v, rank))(x, vectors[i:j]))

    return _certified_or_svd(_in_turn(refined, stacks), stacks, rank)


def refine(
    x: Float[Array, "m n"], vectors: Float[Array, "n n"], rank: int
) -> tuple[Float[Array, "n rank"], Float[Array, ""], Bool[Array, ""]]:
    """Corrects the span of the leading eigenvectors of XᵀX to the accuracy of an SVD of X, and certifies it.

    Forming XᵀX squares the spectrum, and float32 cannot tell its small end from rounding: where σ_k falls fast, the
    span of the first eigenvectors is far off. X V, measured directly, shows how the kept and the dropped vectors still
    couple, and sweeps take that away: a small eigenproblem for the directions next to the cut, and simultaneous
    Jacobi rotations between the two sets for all others (in the manner of Ogita and Aishima, Japan J. Indust. Appl.
    Math. 35, 2018). Spectra too steep for that do not converge, and get no certificate.

    Args:
      x: the matrix.
      vectors: all eigenvectors, the strongest first.
      rank: how many to keep.

    Returns:
      The fields of `Directions` for one layer.
    """
    eps = jnp.finfo(x.dtype).eps
    kept = orthonormalize(vectors[:, :rank])
    rest = vectors[:, rank:] - matmul(kept, matmul(kept.T, vectors[:, rank:]))
    kept_response, rest_response = matmul(x, kept), matmul(x, rest)
    top = jnp.max(jnp.linalg.norm(kept_response, axis=0))
    used = jnp.ones((1, rank), bool)
    size = jnp.zeros((), x.dtype)
    for _ in range(REFINE_SWEEPS):
        kept, rest, kept_response, rest_response = _sort_cut(kept, rest, kept_response, rest_response)
        # What is not used is a null direction, which the rank mask drops.
        used = jnp.linalg.norm(kept_response, axis=0, keepdims=True) > max(x.shape) * eps * top
        tangent = jnp.where(used, _rotations(kept_response, rest_response), 0)
        size = jnp.linalg.norm(tangent)
        tangent *= jnp.minimum(1, MOST_ROTATION / jnp.maximum(size, eps))
        kept, rest = kept + matmul(rest, tangent), rest - matmul(kept, tangent.T)
        kept_response, rest_response = (
            kept_response + matmul(rest_response, tangent),
            rest_response - matmul(kept_response, tangent.T),
        )
    last = jnp.min(jnp.where(used, jnp.linalg.norm(kept_response, axis=0, keepdims=True), top))
    following = jnp.max(jnp.linalg.norm(rest_response, axis=0))
    # The second term is what float32 rounding of X V leaves at this gap, in any route.
    bound = CERTIFIED_ANGLE + eps * top / jnp.maximum(last - following, eps * top)
    certified = (size <= jnp.minimum(bound, WORST_ANGLE)) & (last >= following)
    cut = jnp.stack([jnp.where(jnp.all(used), last, 0), following])
    return orthonormalize(kept), relative_gap(cut[None], 1)[0], certified


def _sort_cut(
    kept: Float[Array, "n k"],
    rest: Float[Array, "n r"],
    kept_response: Float[Array, "m k"],
    rest_response: Float[Array, "m r"],
) -> tuple[Float[Array, "n k"], Float[Array, "n r"], Float[Array, "m k"], Float[Array, "m r"]]:
    """Solves the small eigenproblem of the directions next to the cut, which are too close for single rotations."""
    width = min(CUT_WINDOW, kept.shape[1], rest.shape[1])
    k = kept.shape[1] - width
    near = jnp.concatenate([kept[:, k:], rest[:, :width]], axis=1)
    response = jnp.concatenate([kept_response[:, k:], rest_response[:, :width]], axis=1)
    scale = jnp.max(jnp.abs(response))
    _, u = jnp.linalg.eigh(gram(response / jnp.where(scale > 0, scale, 1)))
    near, response = matmul(near, u[:, ::-1]), matmul(response, u[:, ::-1])
    return (
        jnp.concatenate([kept[:, :k], near[:, :width]], axis=1),
        jnp.concatenate([near[:, width:], rest[:, width:]], axis=1),
        jnp.concatenate([kept_response[:, :k], response[:, :width]], axis=1),
        jnp.concatenate([response[:, width:], rest_response[:, width:]], axis=1),
    )


def _rotations(kept: Float[Array, "m k"], rest: Float[Array, "m r"]) -> Float[Array, "r k"]:
    """Tangents of the Jacobi rotations that decouple each pair of responses, all at once; none above 1."""
    coupling = matmul(rest.T, kept)
    distance = jnp.sum(kept**2, axis=0, keepdims=True) - jnp.sum(rest**2, axis=0, keepdims=True).T
    root = jnp.sqrt(distance**2 + 4 * coupling**2)
    return 2 * coupling / jnp.where(root > 0, distance + jnp.where(distance < 0, -root, root), 1)


def orthonormalize(v: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """Makes nearly orthonormal columns orthonormal (Newton-Schulz)."""
    for _ in range(3):
        v = 1.5 * v - 0.5 * matmul(v, gram(v))
    return v


def leading_by_iteration(stacks: Stacks, grams: Float[Array, "layers n n"], rank: int) -> Directions:
    """Default route for V1 of wide layers: block power iteration with Rayleigh-Ritz, certified."""
    n = grams.shape[-1]
    block = min(n, rank + max(8, rank // 2))
    start = jax.random.normal(jax.random.key(0), (n, block), grams.dtype)
    found = Directions(*jax.vmap(lambda g: _iterate(g, start, rank))(grams))
    return _certified_or_svd(found, stacks, rank)


def _iterate(
    g: Float[Array, "n n"], start: Float[Array, "n b"], rank: int
) -> tuple[Float[Array, "n k"], Float[Array, ""], Bool[Array, ""]]:
    """Block power iteration on one Gram matrix; the fields of `Directions` for one layer."""
    eps = jnp.finfo(g.dtype).eps
    q = jax.lax.fori_loop(0, POWER_PASSES, lambda _, q: independent_basis(matmul(g, q)), start)
    gq = matmul(g, q)
    ritz, u = jnp.linalg.eigh(matmul(q.T, gq))
    ritz, u = jnp.maximum(ritz[::-1], 0), u[:, ::-1]
    v = matmul(q, u[:, :rank])
    top = ritz[0]
    # Directions below the rank mask's threshold are dropped later and need no certificate.
    counts = jnp.sqrt(ritz) > g.shape[0] * eps * jnp.sqrt(top)
    residual = jnp.where(counts[None, :rank], matmul(gq, u[:, :rank]) - v * ritz[None, :rank], 0)
    n_kept = jnp.sum(counts[:rank])
    padded = jnp.append(ritz, 0)
    separation = padded[n_kept - 1] - padded[n_kept]
    # sin(angle) <= |residual| / separation; 8 eps |G| is what rounding leaves of the residual in any route.
    bound = CERTIFIED_ANGLE * separation + 8 * eps * top
    certified = (jnp.linalg.norm(residual) <= bound) | (top == 0)
    return v, relative_gap(jnp.sqrt(ritz)[None], rank)[0], certified


def independent_basis(y: Float[Array, "n b"]) -> Float[Array, "n b"]:
    """Orthonormal basis of any columns; columns without weight of their own come out as arbitrary directions.

    Eigenvectors of the scaled Gram matrix, twice (SVQB; Stathopoulos and Wu, SIAM J. Sci. Comput. 23, 2002): two
    products and a small eigenproblem, where Householder QR would go column by column on an accelerator.
    """
    eps = jnp.finfo(y.dtype).eps
    for _ in range(2):
        scale = jnp.linalg.norm(y, axis=0, keepdims=True)
        y = y / jnp.where(scale > 0, scale, 1)
        values, u = jnp.linalg.eigh(gram(y))
        y = matmul(y, u) * jax.lax.rsqrt(jnp.maximum(values, y.shape[1] * eps))[None]
    return y


def _certified_or_svd(found: Directions, stacks: Stacks, rank: int) -> Directions:
    """`found`, and the SVD for the layers without a certificate alone: their neighbours keep what they have.

    Layer by layer, so that one difficult layer does not cost a decomposition of all.
    """

    def layer(x: Float[Array, "m n"], one: Directions) -> Directions:
        def exact(x: Float[Array, "m n"]) -> Directions:
            by_svd = jax.tree.map(lambda leaf: leaf[0], leading_by_svd((x[None],), rank))
            return by_svd._replace(certified=one.certified)

        return jax.lax.cond(one.certified, lambda _: one, exact, x)

    def loop(x: Float[Array, "layers m n"], i: int, j: int) -> Directions:
        rows = jax.tree.map(lambda leaf: leaf[i:j], found)
        # `found` as a whole, not only its part for this stack.
        return jax.lax.map(lambda row: layer(*row), (after(x, found.vectors), rows))

    return _in_turn(loop, stacks)


def _in_turn(solve: Callable[[Array, int, int], Directions], stacks: Stacks) -> Directions:
    """`solve(stack, first layer, last layer + 1)` for each stack, none before the one before it is through."""
    parts: list[Directions] = []
    for stack, (i, j) in zip(stacks, bounds(stacks), strict=True):
        parts.append(solve(after(stack, parts[-1].vectors) if parts else stack, i, j))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def relative_gap(s: Float[Array, "layers k"], rank: int) -> Float[Array, " layers"]:
    """(σ_rank − σ_rank+1) / σ_rank, 1 where nothing is cut off."""
    if rank >= s.shape[-1]:
        return jnp.ones(s.shape[0], s.dtype)
    last = s[:, rank - 1]
    return jnp.where(last > 0, (last - s[:, rank]) / jnp.where(last > 0, last, 1), 1)


def rank_mask(x: Float[Array, "m n"], vectors: Float[Array, "n k"]) -> tuple[Float[Array, "n k"], Float[Array, "m k"]]:
    """Sets directions that `x` does not really use to zero.

    A direction counts if ‖X v_k‖ > max(m, n) eps σ_1. A mask and not a slice: one program serves all ranks.
    ‖X v_k‖ is measured: the root of a Gram eigenvalue would count rounding noise.

    Returns:
      The masked vectors V and the product X V.
    """
    if vectors.shape[1] == 0:
        return vectors, matmul(x, vectors)
    response = matmul(x, vectors)
    s = jnp.linalg.norm(response, axis=0)
    used = s > jnp.max(s) * max(x.shape) * jnp.finfo(x.dtype).eps
    return jnp.where(used[None], vectors, 0), jnp.where(used[None], response, 0)


def route(decomposition: Decomposition, width: int, *, iterate: bool) -> Decomposition:
    """The route that `auto` takes, by what costs least: exact, but for few directions of a wide layer.

    Args:
      decomposition: what the user asked for.
      width: n, inputs of the layer.
      iterate: whether few directions are wanted (V1), so that an iteration converges in few passes.
    """
    if decomposition != "auto":
        return decomposition
    return "subspace" if iterate and width > SMALL_WIDTH else "eigh"
