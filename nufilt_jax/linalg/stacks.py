"""Stacks: matrices of one width, those of one shape side by side; and all of them as one batch, stack by stack."""

import itertools
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nufilt_jax.linalg.factored import Matrix

Stacks = tuple[Float[Array, "_ _ n"], ...]  # a stack per shape [m, n], with a leading axis over its layers
MatrixStacks = tuple[Float[Matrix, "_ _ n"], ...]  # the same, some of them factored perhaps
Tree = TypeVar("Tree")


def bounds(stacks: MatrixStacks) -> list[tuple[int, int]]:
    """Where each stack's layers begin and end in the concatenation of all."""
    return list(itertools.pairwise(itertools.accumulate((len(stack) for stack in stacks), initial=0)))


def rows(tree: Tree, i: int, j: int) -> Tree:
    """Layers i to j − 1 of arrays over all layers."""
    return jax.tree.map(lambda x: x[i:j], tree)


def joined(parts: Sequence[Tree]) -> Tree:
    """What belongs to each stack, as arrays over the layers of all."""
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
