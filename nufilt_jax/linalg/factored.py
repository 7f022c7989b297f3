"""A matrix as a product of two thin ones, beside the dense one: what multiplies either is written once.

A method that multiplies X from the right alone needs its rows R alone: X = Q R with QᵀQ = I has the singular values,
the right singular vectors, the norm and the XᵀX of R, and X F is Q (R F).
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nufilt_jax.linalg.dense import inner, matmul
from nufilt_jax.linalg.dispatch import after

T = TypeVar("T")
# What is left of a unit vector in a span that it belongs to: rounding, and by chance hardly ever as much as this.
_NOTHING_NEW = 1e-3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Factored:
    """X = Q R, of one matrix or of many with leading axes; the arrays may be of the host.

    Attributes:
      basis: Q, of orthonormal columns; some may be zero.
      rows: R.
    """

    basis: Any  # [*batch, m, r]
    rows: Any  # [*batch, r, n]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of X."""
        return (*self.basis.shape[:-1], self.rows.shape[-1])

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Of both factors."""
        return self.rows.dtype

    @property
    def rank(self) -> int:
        """Number of rows of R."""
        return self.rows.shape[-2]

    def __len__(self) -> int:
        return len(self.basis)

    def __getitem__(self, index: Any) -> "Factored":
        """Some of the matrices, by the first of the leading axes."""
        return Factored(self.basis[index], self.rows[index])

    def outputs(self, part: slice) -> Any:
        """Some rows of one X, as they are."""
        return self.basis[part] @ self.rows


Matrix = Array | Factored


def rows_of(x: Float[Matrix, "*batch m n"]) -> Float[Array, "*batch r n"]:
    """A matrix with the singular values and right singular vectors of X: R of a factored one, X itself of any other."""
    return x.rows if isinstance(x, Factored) else x


def with_rows(x: Float[Matrix, "*batch m n"], rows: Float[Array, "*batch r k"]) -> Float[Matrix, "*batch m k"]:
    """X F, from `rows_of(x)` times F: nothing is multiplied."""
    return Factored(x.basis, rows) if isinstance(x, Factored) else rows


def by_outputs(x: Float[Matrix, "m n"], y: Float[Array, "r k"]) -> Float[Array, "m k"]:
    """What stands by the rows of X, by its outputs, Q Y of a factored X: `rows_of(x)` times F becomes X F."""
    return matmul(x.basis, y) if isinstance(x, Factored) else y


def gathered(x: Float[Matrix, "m n"], y: Float[Array, "m k"]) -> Float[Array, "r k"]:
    """What Y is by the rows of X, QᵀY of a factored X and Y itself of any other: `rows_of(x).T` times it is XᵀY."""
    return inner(x.basis, y) if isinstance(x, Factored) else y


def dense(x: Float[Matrix, "*batch m n"]) -> Float[Array, "*batch m n"]:
    """X, multiplied out."""
    return matmul(x.basis, x.rows) if isinstance(x, Factored) else x


def plus_product(
    x: Float[Matrix, "m n"], left: Float[Array, "m k"], right: Float[Array, "n k"]
) -> Float[Matrix, "m n"]:
    """X + L Rᵀ. Of a factored X the basis is that of both side by side, and orthonormal again only after `plus`."""
    if not isinstance(x, Factored):
        return x + matmul(left, right.T)
    return Factored(jnp.concatenate([x.basis, left], axis=1), jnp.concatenate([x.rows, right.T]))


def plus(x: Float[Matrix, "m n"], y: Float[Matrix, "m n"], within: Float[Matrix, "m n"]) -> Float[Matrix, "m n"]:
    """X + Y, kept as X is kept and in as many columns.

    Args:
      x: a factored one has room for the sum: as many columns of zeros at the end as `within` has columns.
      y: what is added.
      within: the columns of Y are combinations of its basis and of that of X. None is needed where X is dense.
    """
    if not isinstance(x, Factored):
        return x + dense(y)
    if not isinstance(y, Factored) or not isinstance(within, Factored):
        raise TypeError("a dense matrix is not added to a factored one")
    r = within.rank
    if r == 0:
        return x
    # The decomposition waits for those that Y came from: on CPU no two may be in flight.
    new = _beyond(x.basis, after(within.basis, y.rows))
    basis = jnp.concatenate([new, x.basis[:, :-r]], axis=1)
    old = jnp.concatenate([jnp.zeros((r, x.shape[-1]), x.dtype), x.rows[:-r]])
    return Factored(basis, old + matmul(inner(basis, y.basis), y.rows))


def _beyond(q: Float[Array, "m k"], v: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """Orthonormal columns that span with those of Q what V spans with them; zero where V has nothing new.

    Where a column of V lies in the span of Q, its rest is rounding, and its direction anything: the second pass makes
    that orthogonal to Q too. Columns of zeros, which a rank is filled up with, stay so.
    """

    def rest(v: Float[Array, "m r"]) -> Float[Array, "m r"]:
        return v - matmul(q, inner(q, v))

    first, _ = jnp.linalg.qr(rest(v))
    second, sizes = jnp.linalg.qr(rest(first))
    is_new = (jnp.abs(jnp.diagonal(sizes)) > _NOTHING_NEW) & jnp.any(v != 0, axis=0)
    return jnp.where(is_new, rest(second), 0)


def chosen(use: Bool[Array, " layers"], new: T, old: T) -> T:
    """Of batches of matrices, layer by layer one of two."""
    return jax.tree.map(lambda x, y: jnp.where(use[:, None, None], x, y), new, old)


def all_finite(x: Float[Matrix, "layers *shape"]) -> Bool[Array, " layers"]:
    """Whether all numbers of each layer are finite."""
    # All zeros but for what is not finite: adding them up is faster on a CPU than `isfinite` and `all`.
    sums = [jnp.sum(0 * part, axis=tuple(range(1, part.ndim))) == 0 for part in jax.tree.leaves(x)]
    return sums[0] if len(sums) == 1 else jnp.all(jnp.stack(sums), axis=0)


def after_all(x: T, *done: Array) -> T:
    """`dispatch.after` for a matrix of either kind."""
    return jax.tree.map(lambda part: after(part, *done), x)
