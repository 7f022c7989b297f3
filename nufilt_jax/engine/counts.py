"""Arithmetic and memory traffic of the stages of a solve, from shapes and settings alone.

Flops are those of dense linear algebra, a multiplication and an addition each: 2 m n k for a product [m, k] [k, n],
symmetric or not. Bytes are float32 operands read and results written once per product, whatever a cache saves; sums,
scalings and masks count as part of the product next to them.

Reduce, Adam and fuse have formulas, with r = r_p + r_v directions. Per layer [m, n]:

- reduce: U = V2 (V2ᵀ V1) (4 n r_p r_v); τ U, D V1 and, where the Gram matrix is formed, K = τᵀ C1 (2 m n r_v each).
- adam, per step: G B (2 n² r_l), or τ B and a product with τᵀ (2 m n r_l each) where no Gram matrix is formed; A V and
  its gradient's product with Vᵀ (2 n r_l r each); BᵀG B, G B Z Zᵀ (2 k r_l² each, k the rows of what is held of G: n,
  or m); Z Zᵀ and BᵀGB Z (2 r_l² r each); Bᵀ K and K Z1ᵀ (2 k r_l r_v each); 26 flops for each of the 2 n r_l trained
  numbers. The loss after the last step is one more evaluation of the products.
- fuse: τ [V2 B] and [−τ V2, τ B] [V2 Aᵀ]ᵀ (2 m n (r_p + r_l) each); for the forecast A V2 and (τ B) (A V2)
  (2 (n + m) r_l r_p), (τ B)ᵀ (τ B) and A Aᵀ (2 (n + m) r_l²).

How often the iterations of a decomposition multiply depends on the data: no formula has that.
"""

from collections.abc import Iterable
from typing import NamedTuple

from nufilt_jax.core.settings import SolveConfig

ADAM_FLOPS = 26  # per trained number: two moments, two corrections, root, quotient, step


class Work(NamedTuple):
    """Work of a stage."""

    flops: float = 0
    bytes: float = 0

    def __add__(self, other: "Work") -> "Work":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> "Work":
        """The work of `factor` such."""
        return Work(self.flops * factor, self.bytes * factor)


def product(m: int, k: int, n: int) -> Work:
    """A product [m, k] [k, n]."""
    return Work(2 * m * k * n, 4 * (m * k + k * n + m * n))


def total(counts: Iterable[Work]) -> Work:
    """All of them together."""
    return sum(counts, Work())


def reduce_count(m: int, n: int, config: SolveConfig, *, factored: bool = False) -> Work:
    """One layer's reduction; `factored` as of `adam_count`."""
    p, v = config.filter_rank, config.task_rank
    pull = [] if factored else [product(n, m, v)]
    return total([product(p, n, v), product(n, p, v), *[product(m, n, v)] * 2, *pull])


def adam_count(m: int, n: int, config: SolveConfig, *, factored: bool = False) -> Work:
    """One layer's Adam: all steps, and the last loss.

    Args:
      m: outputs.
      n: inputs.
      config: ranks and steps.
      factored: τᵀτ is used as its two factors.
    """
    r_l, v = config.adapter_rank, config.task_rank
    r = config.filter_rank + v
    by_gram = [product(m, n, r_l), product(n, m, r_l)] if factored else [product(n, n, r_l)]
    rows = m if factored else n
    products = [
        *by_gram,
        *(product(r_l, n, r), product(r_l, r, n)),
        *(product(r_l, rows, r_l), product(rows, r_l, r_l), product(r_l, r, r_l), product(r_l, r_l, r)),
        *(product(r_l, rows, v), product(rows, v, r_l)),
    ]
    trained = 2 * n * r_l
    update = Work(ADAM_FLOPS * trained, 4 * 7 * trained)  # gradient, number and two moments read, three written
    return total(products).times(config.steps + 1) + update.times(config.steps)


def fuse_count(m: int, n: int, config: SolveConfig) -> Work:
    """One layer's fusion."""
    r_l, p = config.adapter_rank, config.filter_rank
    products = [product(m, n, p + r_l), product(m, p + r_l, n)]
    for_forecast = [product(r_l, n, p), product(m, r_l, p), product(r_l, m, r_l), product(r_l, n, r_l)]
    return total(products + for_forecast)
