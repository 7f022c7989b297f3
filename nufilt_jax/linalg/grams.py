"""XᵀX of batches of matrices: the product itself or, for wide X, X alone, with which it is cheaper to multiply.

Each up to a factor of its own, a power of two, without which the squares of large weights overflow and those of small
ones vanish.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from nufilt_jax.linalg.dense import gram, inner, matmul, unit_scale
from nufilt_jax.linalg.stacks import Stacks


class GramMatrix(NamedTuple):
    """c XᵀX, formed.

    Attributes:
      matrix: c XᵀX.
      unit: √c.
    """

    matrix: Float[Array, "*batch n n"]
    unit: Float[Array, "*batch 1 1"]

    def times(self, y: Float[Array, "*batch n k"]) -> Float[Array, "*batch n k"]:
        """C XᵀX Y."""
        return matmul(self.matrix, y)

    def halves(self, y: Float[Array, "*batch n k"]) -> tuple[Float[Array, "*batch n k"], Float[Array, "*batch n k"]]:
        """L and R with LᵀR = c YᵀXᵀX Y, of which `joined(R)` is C XᵀX Y."""
        return y, self.times(y)

    def joined(self, right: Float[Array, "*batch n k"]) -> Float[Array, "*batch n k"]:
        """See `halves`."""
        return right

    def met(self, x: Float[Array, "*batch m n"], y: Float[Array, "*batch m k"]) -> Float[Array, "*batch n k"]:
        """What `joined` makes √c XᵀY of, given this X and Y."""
        return self.unit * inner(x, y)

    def scaled(self, by: Float[Array, "*batch 1 1"]) -> "GramMatrix":
        """This, times a non-negative number."""
        return GramMatrix(self.matrix * by, self.unit * jnp.sqrt(by))

    def trace(self) -> Float[Array, "*batch 1 1"]:
        """C times the sum of squares of X's entries."""
        return jnp.trace(self.matrix, axis1=-2, axis2=-1)[..., None, None]

    def formed(self) -> Float[Array, "*batch n n"]:
        """C XᵀX."""
        return self.matrix


class GramFactor(NamedTuple):
    """c XᵀX, as X: for fewer than n/2 outputs two products with X cost less than one with XᵀX.

    Attributes:
      factor: X.
      unit: √c.
    """

    factor: Float[Array, "*batch m n"]
    unit: Float[Array, "*batch 1 1"]

    def times(self, y: Float[Array, "*batch n k"]) -> Float[Array, "*batch n k"]:
        """C XᵀX Y."""
        # The unit between the products: m k numbers to scale, the fewest there are.
        return inner(self.factor, self.unit**2 * matmul(self.factor, y))

    def halves(self, y: Float[Array, "*batch n k"]) -> tuple[Float[Array, "*batch m k"], Float[Array, "*batch m k"]]:
        """L and R with LᵀR = c YᵀXᵀX Y, of which `joined(R)` is C XᵀX Y: m rows each, where n is more than twice m."""
        response = self.unit * matmul(self.factor, y)
        return response, response

    def joined(self, right: Float[Array, "*batch m k"]) -> Float[Array, "*batch n k"]:
        """See `halves`."""
        return inner(self.factor, self.unit * right)

    def met(self, _: Float[Array, "*batch m n"], y: Float[Array, "*batch m k"]) -> Float[Array, "*batch m k"]:
        """What `joined` makes √c XᵀY of, given this X and Y."""
        return y

    def scaled(self, by: Float[Array, "*batch 1 1"]) -> "GramFactor":
        """This, times a non-negative number."""
        return GramFactor(self.factor, self.unit * jnp.sqrt(by))

    def trace(self) -> Float[Array, "*batch 1 1"]:
        """C times the sum of squares of X's entries."""
        # The unit first: squares of what it has not scaled overflow.
        return jnp.sum((self.unit * self.factor) ** 2, axis=(-2, -1), keepdims=True)

    def formed(self) -> Float[Array, "*batch n n"]:
        """C XᵀX."""
        return gram(self.unit * self.factor)


Gram = GramMatrix | GramFactor


def gram_of(stacks: Stacks) -> Gram:
    """The Gram matrices of all layers of stacks of one width, in units in which no entry of X is large or small."""
    _, m, n = stacks[0].shape
    units = [unit_scale(x) for x in stacks]
    # 4 m n k flops instead of 2 n² k. Of one stack only: factors of different m share no batch, Gram matrices do.
    if len(stacks) == 1 and 2 * m < n:
        return GramFactor(stacks[0], units[0])
    grams = [gram(unit * x) for x, unit in zip(stacks, units, strict=True)]
    return GramMatrix(jnp.concatenate(grams), jnp.concatenate(units))
