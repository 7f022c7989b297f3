"""Leading right singular vectors: what the merged model uses (V2) and what the new task needs (V1).

Only the leading few of n directions are ever used, so no route here computes left factors it does not need:

- `eigh`: eigenvectors of the Gram matrix XᵀX (exact, for narrow layers).
- `subspace`: Chebyshev-filtered subspace iteration on the Gram matrix (`linalg.chebyshev`).
- `svd`: the reference, several times slower.

`eigh` and `subspace` are refined against X itself and certified layer by layer (`linalg.refine`); a layer without a
certificate takes the SVD. `route` says which of them `auto` takes, and why.

On CPU, LAPACK calls of XLA must never overlap: as many in flight as the pool has workers, and none ever returns.
Every function here is therefore written for a whole batch, one call at a time.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nufilt_jax.config import Decomposition
from nufilt_jax.linalg.chebyshev import block_width, improved_block, leading_block
from nufilt_jax.linalg.dense import eigh_descending, inner, matmul, orthonormalize
from nufilt_jax.linalg.directions import FULL_WIDTH, Directions, in_turn, leading_by_svd
from nufilt_jax.linalg.dispatch import after
from nufilt_jax.linalg.factored import Factored, rows_of
from nufilt_jax.linalg.grams import Gram, gram_of
from nufilt_jax.linalg.refine import refine
from nufilt_jax.linalg.stacks import MatrixStacks, Stacks, rows
from nufilt_jax.linalg.thin import leading_of_rows


def leading_of(
    matrices: MatrixStacks,
    rank: int,
    decomposition: Decomposition,
    grams: Gram | None = None,
    *,
    until_certified: bool = True,
) -> Directions:
    """Leading right singular vectors of every matrix in stacks of one width n, dense or factored.

    Args:
      matrices: X.
      rank: how many vectors; at most as many as X has columns, or a factored one rows, come out.
      decomposition: which route, as the user asked for it.
      grams: of the rows of the matrices, where they are known already.
      until_certified: as of `leading`.
    """
    stacks = tuple(map(rows_of, matrices))
    # The reference is asked for to be sure: it takes nothing but the SVD.
    if decomposition != "svd" and all(isinstance(x, Factored) for x in matrices):
        return leading_of_rows(stacks, rank, until_certified=until_certified)
    chosen = route(decomposition, stacks[0].shape[-1])
    grams = gram_of(stacks) if grams is None else grams
    return leading(stacks, grams, rank, chosen, until_certified=until_certified)


def route(decomposition: Decomposition, width: int) -> Decomposition:
    """The route that `auto` takes.

    | inputs n | V2 and V1, on every platform |
    | --- | --- |
    | up to `FULL_WIDTH` | `eigh`: a full decomposition is cheap |
    | more | `subspace`: the fastest that is as accurate (benchmarks/results/decompositions*.json), O(n² k) products |

    Both are refined, certified to the same angle and replaced by the SVD where that fails.

    Args:
      decomposition: what the user asked for.
      width: n, inputs of the layer.
    """
    if decomposition != "auto":
        return decomposition
    return "eigh" if width <= FULL_WIDTH else "subspace"


def leading(
    stacks: Stacks, grams: Gram, rank: int, chosen: Decomposition, *, until_certified: bool = True
) -> Directions:
    """Leading right singular vectors of every matrix in stacks of one width n.

    Args:
      stacks: the matrices X.
      grams: XᵀX of all layers, from `grams.gram_of`; not used by `svd`.
      rank: how many vectors; at most n come out.
      chosen: `eigh`, `svd` or `subspace`, from `route`; the last means `eigh` where all vectors, or nearly, are wanted.
      until_certified: try harder with layers that get no certificate, and take their SVD at last. Without it they come
        as they are, from a program several times as quick to compile, and `certified` says so.
    """
    n_layers, n = sum(len(x) for x in stacks), stacks[0].shape[-1]
    whole = jnp.ones(n_layers), jnp.ones(n_layers, bool)
    if rank == 0:
        none = jnp.zeros((n_layers, n, 0), stacks[0].dtype)
        return Directions(none, none[:, 0], *whole)
    if chosen == "svd":
        return leading_by_svd(stacks, rank)
    rank = min(rank, n)
    apart = functools.partial(_set_apart, grams, rank=rank)
    if chosen == "eigh" or block_width(rank, n) == n:  # no iteration is cheaper than finding all
        blocks = eigh_descending(grams.formed())[1][:, :, : block_width(rank, n)]
        prepare = [lambda v: v, apart] if rank < n else [lambda v: v]
    else:
        blocks, edge = leading_block(grams, n, rank)
        prepare = [lambda v: v, apart, lambda v: apart(improved_block(grams, orthonormalize(v), edge, rank)), apart]
    if not until_certified:
        found = _refined(stacks, blocks, rank)
        return found._replace(vectors=found.vectors[:, :, :rank])
    # Spectra that fall steeply need the correction twice.
    found = _refined_until_certified(stacks, blocks, rank, prepare)
    return _certified_or_svd(found._replace(vectors=found.vectors[:, :, :rank]), stacks, rank)


def _set_apart(grams: Gram, vectors: Float[Array, "layers n b"], rank: int) -> Float[Array, "layers n b"]:
    """Orthonormal columns, the leading ones decoupled from each other, their span unchanged."""
    vectors = orthonormalize(vectors)
    kept = vectors[:, :, :rank]
    _, u = eigh_descending(inner(kept, grams.times(kept)))
    return jnp.concatenate([matmul(kept, u), vectors[:, :, rank:]], axis=2)


def _refined_until_certified(
    stacks: Stacks, blocks: Float[Array, "layers n b"], rank: int, prepare: Sequence[Callable[[Array], Array]]
) -> Directions:
    """Refines blocks, each attempt prepared in its own way; a layer keeps the first result that is certified."""

    def wanted(state: tuple[Directions, Int[Array, ""]]) -> Bool[Array, ""]:
        found, attempt = state
        return ~jnp.all(found.certified) & (attempt < len(prepare))

    def try_again(state: tuple[Directions, Int[Array, ""]]) -> tuple[Directions, Int[Array, ""]]:
        found, attempt = state
        prepared = jax.lax.switch(attempt, prepare, after(found.vectors, found.gap))
        new = _refined(stacks, prepared, rank)

        def choose(old: Array, new: Array) -> Array:
            return jnp.where(found.certified.reshape(-1, *[1] * (new.ndim - 1)), old, new)

        return jax.tree.map(choose, found, new), attempt + 1

    zeros = jnp.zeros((len(blocks), rank), blocks.dtype)
    nothing = Directions(blocks, zeros, zeros[:, 0], jnp.zeros(len(blocks), bool))
    return jax.lax.while_loop(wanted, try_again, (nothing, jnp.zeros((), int)))[0]


def _refined(stacks: Stacks, blocks: Float[Array, "layers n b"], rank: int) -> Directions:
    """Whole blocks, refined, with the gap and certificate of their leading directions."""

    def one(x: Float[Array, "layers m n"], i: int, j: int) -> Directions:
        found = jax.vmap(lambda x, block: refine(x, block, rank))(x, blocks[i:j])
        return Directions(found.block, found.sizes, found.gap, found.certificate.holds)

    return in_turn(one, stacks)


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
        # `found` as a whole, not only its part for this stack.
        return jax.lax.map(lambda row: layer(*row), (after(x, found.vectors), rows(found, i, j)))

    return jax.lax.cond(jnp.all(found.certified), lambda: found, lambda: in_turn(loop, stacks))
