"""XᵀX of batches of matrices: the product itself or, for wide X, X alone, with which it is cheaper to multiply."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from nufilt_jax.core.linalg import gram, matmul, transpose


class GramMatrix(NamedTuple):
    """XᵀX, formed."""

    matrix: Float[Array, "*batch n n"]

    def times(self, y: Float[Array, "*batch n k"]) -> Float[Array, "*batch n k"]:
        """XᵀX Y."""
        return matmul(self.matrix, y)

    def scaled(self, by: Float[Array, "*batch 1 1"]) -> "GramMatrix":
        """This, times a non-negative number."""
        return GramMatrix(self.matrix * by)

    def trace(self) -> Float[Array, "*batch 1 1"]:
        """The sum of squares of X's entries."""
        return jnp.trace(self.matrix, axis1=-2, axis2=-1)[..., None, None]

    def formed(self) -> Float[Array, "*batch n n"]:
        """XᵀX."""
        return self.matrix


class GramFactor(NamedTuple):
    """XᵀX, as X: for fewer than n/2 outputs two products with X cost less than one with XᵀX."""

    factor: Float[Array, "*batch m n"]

    def times(self, y: Float[Array, "*batch n k"]) -> Float[Array, "*batch n k"]:
        """XᵀX Y."""
        return matmul(transpose(self.factor), matmul(self.factor, y))

    def scaled(self, by: Float[Array, "*batch 1 1"]) -> "GramFactor":
        """This, times a non-negative number."""
        return GramFactor(self.factor * jnp.sqrt(by))

    def trace(self) -> Float[Array, "*batch 1 1"]:
        """The sum of squares of X's entries."""
        return jnp.sum(self.factor**2, axis=(-2, -1), keepdims=True)

    def formed(self) -> Float[Array, "*batch n n"]:
        """XᵀX."""
        return gram(self.factor)


Gram = GramMatrix | GramFactor


def gram_of(stacks: Sequence[Float[Array, "_ _ n"]]) -> Gram:
    """The Gram matrices of all layers of stacks of one width."""
    _, m, n = stacks[0].shape
    if len(stacks) == 1 and 2 * m < n:
        return GramFactor(stacks[0])
    return GramMatrix(jnp.concatenate([gram(x) for x in stacks]))
