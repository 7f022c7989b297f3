"""Arithmetic and memory traffic of the stages of a solve.

Flops are those of dense linear algebra, a multiplication and an addition each: 2 m n k for a product [m, k] [k, n],
symmetric or not. Bytes are float32 operands read and results written once per product, whatever a cache saves; sums,
scalings and masks count as part of the product next to them.

Reduce, Adam and fuse have formulas, with r = r_p + r_v directions. Per layer [m, n]:

- reduce: U = V2 (V2ᵀ V1) (4 n r_p r_v); τ U, D V1 and K = τᵀ C1 (2 m n r_v each).
- adam, per step: G B (2 n² r_l), or τᵀ(τ B) (4 m n r_l) where no Gram matrix is formed; A V and its gradient's product
  with Vᵀ (2 n r_l r each); BᵀG B, G B Z Zᵀ (2 n r_l² each); Z Zᵀ and BᵀGB Z (2 r_l² r each); Bᵀ K and K Z1ᵀ
  (2 n r_l r_v each); 26 flops for each of the 2 n r_l trained numbers. The loss after the last step is one more
  evaluation of the products.
- fuse: τ [V2 B] and [−τ V2, τ B] [V2 Aᵀ]ᵀ (2 m n (r_p + r_l) each); for the forecast A V2 and (τ B) (A V2)
  (2 (n + m) r_l r_p), (τ B)ᵀ (τ B) and A Aᵀ (2 (n + m) r_l²).

How often an iteration multiplies depends on the data, so the decompositions are counted as they run (`counted`): every
product, and nominal counts for the library calls: eigh 6 n³ (4/3 to tridiagonal form, 8/3 divide and conquer, 2 back),
svd 6 m n² + 20 n³ for m >= n, Cholesky n³/3, triangular solve n² per right-hand side.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from nufilt_jax.linalg.dispatch import run_alone
from nufilt_jax.methods.nufilt import NufiltConfig

ADAM_FLOPS = 26  # per trained number: two moments, two corrections, root, quotient, step


class Count(NamedTuple):
    """Work of a stage."""

    flops: float = 0
    bytes: float = 0

    def __add__(self, other: "Count") -> "Count":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Count(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> "Count":
        """The work of `factor` such."""
        return Count(self.flops * factor, self.bytes * factor)


def product(m: int, k: int, n: int) -> Count:
    """A product [m, k] [k, n]."""
    return Count(2 * m * k * n, 4 * (m * k + k * n + m * n))


def total(counts: Iterable[Count]) -> Count:
    """All of them together."""
    return sum(counts, Count())


def reduce_count(m: int, n: int, config: NufiltConfig) -> Count:
    """One layer's stage 3."""
    p, v = config.filter_rank, config.task_rank
    return total([product(p, n, v), product(n, p, v), *[product(m, n, v)] * 2, product(n, m, v)])


def adam_count(m: int, n: int, config: NufiltConfig, *, factored: bool = False) -> Count:
    """One layer's stage 4: all steps, and the last loss.

    Args:
      m: outputs.
      n: inputs.
      config: ranks and steps.
      factored: τᵀτ is used as its two factors.
    """
    r_l, v = config.adapter_rank, config.task_rank
    r = config.filter_rank + v
    by_gram = [product(m, n, r_l), product(n, m, r_l)] if factored else [product(n, n, r_l)]
    products = [
        *by_gram,
        *(product(r_l, n, r), product(r_l, r, n)),
        *(product(r_l, n, r_l), product(n, r_l, r_l), product(r_l, r, r_l), product(r_l, r_l, r)),
        *(product(r_l, n, v), product(n, v, r_l)),
    ]
    trained = 2 * n * r_l
    update = Count(ADAM_FLOPS * trained, 4 * 7 * trained)  # gradient, number and two moments read, three written
    return total(products).times(config.steps + 1) + update.times(config.steps)


def fuse_count(m: int, n: int, config: NufiltConfig) -> Count:
    """One layer's stage 5."""
    r_l, p = config.adapter_rank, config.filter_rank
    products = [product(m, n, p + r_l), product(m, p + r_l, n)]
    for_forecast = [product(r_l, n, p), product(m, r_l, p), product(r_l, m, r_l), product(r_l, n, r_l)]
    return total(products + for_forecast)


def counted(function: Callable[..., Any], *args: Any) -> Count:
    """Runs `function` with a counter beside every operation: loops count by turn, branches as taken."""
    closed = jax.make_jaxpr(function)(*args)

    @jax.jit
    def count(*args: Any) -> Any:
        return _traced(_run(closed.jaxpr, closed.consts, jax.tree.leaves(args))[1])

    return Count(*map(float, run_alone(count, *args)))


def _run(jaxpr: Jaxpr, consts: Iterable[Any], args: Iterable[Any]) -> tuple[list[Any], Count]:
    """What a function returns, and its work; both may be traced."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))
    count = Count()

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        results, work = _step(equation, [read(atom) for atom in equation.invars])
        count += work
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars], count


def _step(equation: Any, args: list[Any]) -> tuple[list[Any], Count]:
    primitive, params = equation.primitive, equation.params
    if primitive.name in _CONTROL:
        return _CONTROL[primitive.name](equation, args)
    for key in ("jaxpr", "call_jaxpr"):
        if key in params:
            inner = params[key]
            return _run(inner.jaxpr, inner.consts, args) if isinstance(inner, ClosedJaxpr) else _run(inner, (), args)
    results = primitive.bind(*args, **params)
    results = list(results) if primitive.multiple_results else [results]
    return results, _work(primitive.name, params, [jnp.shape(x) for x in args], results)


def _while(equation: Any, args: list[Any]) -> tuple[list[Any], Count]:
    first = equation.params["cond_nconsts"]
    second = first + equation.params["body_nconsts"]
    cond, body = equation.params["cond_jaxpr"], equation.params["body_jaxpr"]

    def goes_on(state: tuple[list[Any], Count]) -> Any:
        return _run(cond.jaxpr, cond.consts, [*args[:first], *state[0]])[0][0]

    def turn(state: tuple[list[Any], Count]) -> tuple[list[Any], Count]:
        carry, work = _run(body.jaxpr, body.consts, [*args[first:second], *state[0]])
        return carry, _traced(state[1] + work)

    return jax.lax.while_loop(goes_on, turn, (args[second:], _traced(Count())))


def _scan(equation: Any, args: list[Any]) -> tuple[list[Any], Count]:
    body, length, backwards = (equation.params[key] for key in ("jaxpr", "length", "reverse"))
    # Rows have an axis more outside the loop than inside: no version of JAX names their number otherwise.
    n_carry = len(equation.outvars) - _deeper(equation.outvars, body.jaxpr.outvars)
    second = len(args) - _deeper(equation.invars, body.jaxpr.invars)
    first = second - n_carry

    def turn(state: tuple[list[Any], Count], row: list[Any]) -> tuple[tuple[list[Any], Count], list[Any]]:
        results, work = _run(body.jaxpr, body.consts, [*args[:first], *state[0], *row])
        return (results[:n_carry], _traced(state[1] + work)), results[n_carry:]

    start = (args[first:second], _traced(Count()))
    (carry, count), rows = jax.lax.scan(turn, start, args[second:], length, backwards)
    return [*carry, *rows], count


def _deeper(outside: Iterable[Any], inside: Iterable[Any]) -> int:
    return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outside, inside, strict=True))


def _cond(equation: Any, args: list[Any]) -> tuple[list[Any], Count]:
    def taken(branch: ClosedJaxpr, *args: Any) -> tuple[list[Any], Count]:
        results, work = _run(branch.jaxpr, branch.consts, args)
        return results, _traced(work)

    index = jnp.asarray(args[0], jnp.int32)
    return jax.lax.switch(
        index, [functools.partial(taken, branch) for branch in equation.params["branches"]], *args[1:]
    )


_CONTROL = {"while": _while, "scan": _scan, "cond": _cond}


def _traced(count: Count) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), count)


def _work(name: str, params: dict[str, Any], shapes: list[tuple[int, ...]], results: list[Any]) -> Count:
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        inner = math.prod(shapes[0][axis] for axis in contracted)
        numbers = sum(map(math.prod, shapes)) + results[0].size
        return Count(2.0 * inner * results[0].size, 4.0 * numbers)
    if name not in ("eigh", "svd", "cholesky", "triangular_solve"):
        return Count()
    *batch, m, n = shapes[0]
    m, n = max(m, n), min(m, n)
    flops = {
        "eigh": 6 * n**3,
        "svd": 6 * m * n**2 + 20 * n**3,
        "cholesky": n**3 / 3,
        "triangular_solve": n**2 * math.prod(shapes[-1][len(batch) :]) / n,
    }
    numbers = sum(map(math.prod, shapes)) + sum(x.size for x in results)
    return Count(float(math.prod(batch) * flops[name]), 4.0 * numbers)
