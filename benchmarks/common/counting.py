"""Arithmetic and memory traffic of a program, counted as it runs.

What counts as work is said in `nufilt_jax.engine.counts`, which has formulas for the stages of a solve. How often an
iteration multiplies depends on the data, so the decompositions are counted here: every product, and nominal counts for
the library calls: eigh 6 n³ (4/3 to tridiagonal form, 8/3 divide and conquer, 2 back), svd 6 m n² + 20 n³ for m >= n,
Cholesky n³/3, triangular solve n² per right-hand side.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from nufilt_jax.engine.counts import Work
from nufilt_jax.linalg.dispatch import run_alone


def counted(function: Callable[..., Any], *args: Any) -> Work:
    """Runs `function` with a counter beside every operation: loops count by turn, branches as taken."""
    closed = jax.make_jaxpr(function)(*args)

    @jax.jit
    def count(*args: Any) -> Any:
        return _traced(_run(closed.jaxpr, closed.consts, jax.tree.leaves(args))[1])

    return Work(*map(float, run_alone(count, *args)))


def _run(jaxpr: Jaxpr, consts: Iterable[Any], args: Iterable[Any]) -> tuple[list[Any], Work]:
    """What a function returns, and its work; both may be traced."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))
    count = Work()

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        results, work = _step(equation, [read(atom) for atom in equation.invars])
        count += work
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars], count


def _step(equation: Any, args: list[Any]) -> tuple[list[Any], Work]:
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


def _while(equation: Any, args: list[Any]) -> tuple[list[Any], Work]:
    first = equation.params["cond_nconsts"]
    second = first + equation.params["body_nconsts"]
    cond, body = equation.params["cond_jaxpr"], equation.params["body_jaxpr"]

    def goes_on(state: tuple[list[Any], Work]) -> Any:
        return _run(cond.jaxpr, cond.consts, [*args[:first], *state[0]])[0][0]

    def turn(state: tuple[list[Any], Work]) -> tuple[list[Any], Work]:
        carry, work = _run(body.jaxpr, body.consts, [*args[first:second], *state[0]])
        return carry, _traced(state[1] + work)

    return jax.lax.while_loop(goes_on, turn, (args[second:], _traced(Work())))


def _scan(equation: Any, args: list[Any]) -> tuple[list[Any], Work]:
    body, length, backwards = (equation.params[key] for key in ("jaxpr", "length", "reverse"))
    # Rows have an axis more outside the loop than inside: no version of JAX names their number otherwise.
    n_carry = len(equation.outvars) - _deeper(equation.outvars, body.jaxpr.outvars)
    second = len(args) - _deeper(equation.invars, body.jaxpr.invars)
    first = second - n_carry

    def turn(state: tuple[list[Any], Work], row: list[Any]) -> tuple[tuple[list[Any], Work], list[Any]]:
        results, work = _run(body.jaxpr, body.consts, [*args[:first], *state[0], *row])
        return (results[:n_carry], _traced(state[1] + work)), results[n_carry:]

    start = (args[first:second], _traced(Work()))
    (carry, count), rows = jax.lax.scan(turn, start, args[second:], length, backwards)
    return [*carry, *rows], count


def _deeper(outside: Iterable[Any], inside: Iterable[Any]) -> int:
    return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outside, inside, strict=True))


def _cond(equation: Any, args: list[Any]) -> tuple[list[Any], Work]:
    def taken(branch: ClosedJaxpr, *args: Any) -> tuple[list[Any], Work]:
        results, work = _run(branch.jaxpr, branch.consts, args)
        return results, _traced(work)

    index = jnp.asarray(args[0], jnp.int32)
    return jax.lax.switch(
        index, [functools.partial(taken, branch) for branch in equation.params["branches"]], *args[1:]
    )


_CONTROL = {"while": _while, "scan": _scan, "cond": _cond}


def _traced(count: Work) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), count)


def _work(name: str, params: dict[str, Any], shapes: list[tuple[int, ...]], results: list[Any]) -> Work:
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        inner = math.prod(shapes[0][axis] for axis in contracted)
        numbers = sum(map(math.prod, shapes)) + results[0].size
        return Work(2.0 * inner * results[0].size, 4.0 * numbers)
    if name not in ("eigh", "svd", "cholesky", "triangular_solve"):
        return Work()
    *batch, m, n = shapes[0]
    m, n = max(m, n), min(m, n)
    flops = {
        "eigh": 6 * n**3,
        "svd": 6 * m * n**2 + 20 * n**3,
        "cholesky": n**3 / 3,
        "triangular_solve": n**2 * math.prod(shapes[-1][len(batch) :]) / n,
    }
    numbers = sum(map(math.prod, shapes)) + sum(x.size for x in results)
    return Work(float(math.prod(batch) * flops[name]), 4.0 * numbers)
