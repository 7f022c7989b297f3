"""Times the small decompositions of a solve, of all layers at once, by every algorithm that a device offers.

A refinement takes eigenvectors of windows of 64 columns, a polynomial Cholesky factors of its block and their inverses:
few operations, whose time on an accelerator is that of its libraries' calls.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import measure, records, script

TITLE = "Small decompositions"
COLUMNS = ("matrices", "what", "algorithm", "min ms", "remark")
SIZES = ((60, 64), (12, 64), (60, 96), (60, 32))  # layers, columns
_eigh = functools.partial(jax.lax.linalg.eigh, symmetrize_input=False)
_WAYS = jax.lax.linalg.EighImplementation


def _inverse(x: jax.Array) -> jax.Array:
    eye = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype)[None], x.shape)
    return jax.lax.linalg.triangular_solve(x, eye, left_side=True, lower=True)


DECOMPOSITIONS: dict[tuple[str, str], Callable[[jax.Array], Any]] = {
    ("eigh", "default"): _eigh,
    ("eigh", "QR"): functools.partial(_eigh, implementation=_WAYS.QR),
    ("eigh", "Jacobi"): functools.partial(_eigh, implementation=_WAYS.JACOBI),
    ("cholesky", "default"): functools.partial(jax.lax.linalg.cholesky, symmetrize_input=False),
    ("triangular inverse", "default"): _inverse,
}


def row(size: tuple[int, int], what: str, algorithm: str, repeats: int) -> list[Any]:
    """One decomposition; where the device does not have it, why."""
    layers, n = size
    x = jax.random.normal(jax.random.key(0), (layers, n, n), jnp.float32)
    x = jnp.einsum("bij,bkj->bik", x, x) / n + jnp.eye(n)[None]
    told = [f"{layers} x [{n}, {n}]", what, algorithm]
    program = jax.jit(DECOMPOSITIONS[what, algorithm])
    try:
        return [*told, 1e3 * measure.time_it(lambda: program(x), repeats).minimum, ""]
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        return [*told, None, str(error).splitlines()[0][:80]]


def main() -> None:
    """Parses the command line and runs."""
    script.prepare_process()
    parser = script.Parser(__doc__, "small_decompositions_PLATFORM.json")
    parser.add_argument("--repeats", type=script.at_least(1), default=20, help="timed runs (default: 20)")
    options = parser.parse_args()
    found = [row(size, *which, options.repeats) for size in SIZES for which in DECOMPOSITIONS]
    measure.finish({"tables": [records.table(TITLE, COLUMNS, found)]}, options, "small_decompositions")


if __name__ == "__main__":
    main()
