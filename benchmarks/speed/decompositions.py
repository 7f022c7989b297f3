"""Times and accuracy of every route to the leading right singular vectors: V2 (128 of them) and V1 (8).

Routes of the package: svd, eigh (Gram matrix), subspace. Others, written here: cholqr, block power iteration with
Cholesky-QR; lobpcg, jax's own, which needs n > 5 × directions. Matrices are square, [batch, n, n].

Errors are those of the first matrix of a batch: the sine of the largest angle between the two spans, and the captured
energy ‖X V‖² over the best possible. A route that would take longer than the budget, going by n³ from the last size
it ran at, is left out, and the table says so.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse.linalg import lobpcg_standard

from benchmarks.common import measure, records, script, shapes
from nufilt_jax.linalg import subspace
from nufilt_jax.linalg.dense import gram, matmul
from nufilt_jax.linalg.dispatch import run_alone
from nufilt_jax.linalg.grams import gram_of

SIZES = (192, 768, 1024, 2048, 4096, 11008)
BATCHES = (1, 8)
SPECTRA = {"flat": None, "k^-0.6": 0.6, "k^-1": 1.0}  # flat: independent normal entries
DIRECTIONS = {"V2": 128, "V1": 8}
LARGEST_FLOAT64 = 2048  # up to this size the reference is a float64 decomposition
POWER_PASSES, LOBPCG_PASSES = 24, 100
COLUMNS = (
    *("n", "batch", "spectrum", "route", "compile s", "min s", "median s", "s per matrix"),
    *("projector error", "captured energy", "certified", "reference", "remark"),
)


class Found(NamedTuple):
    """What a route returns: vectors [batch, n, k], and which layers it certified, if it does."""

    vectors: jax.Array
    certified: jax.Array | None = None


def packaged(x: jax.Array, rank: int, *, chosen: Any) -> Found:
    """A route of `nufilt_jax.linalg.subspace`, with the Gram matrix it starts from."""
    found = subspace.leading((x,), gram_of((x,)), rank, chosen)
    return Found(found.vectors, found.certified)


def cholqr(x: jax.Array, rank: int) -> Found:
    """Block power iteration on XᵀX; a Cholesky factor makes each block orthonormal, twice."""
    n = x.shape[-1]
    g = gram(x)
    start = jax.random.normal(jax.random.key(0), (n, _block(rank, n)), x.dtype)

    def orthonormal(y: jax.Array) -> jax.Array:
        y = y / jnp.linalg.norm(y, axis=1, keepdims=True)
        shifted = gram(y) + 1e-6 * jnp.eye(y.shape[2], dtype=y.dtype)[None]
        factor = jnp.linalg.cholesky(shifted)
        return jax.lax.linalg.triangular_solve(factor, y, left_side=False, lower=True, transpose_a=True)

    def one_pass(_: Any, q: jax.Array) -> jax.Array:
        return orthonormal(orthonormal(matmul(g, q)))

    q = jax.lax.fori_loop(0, POWER_PASSES, one_pass, jnp.broadcast_to(start, (len(x), *start.shape)))
    _, u = jnp.linalg.eigh(matmul(jnp.swapaxes(q, 1, 2), matmul(g, q)))
    return Found(matmul(q, u[:, :, ::-1][:, :, :rank]))


def _block(rank: int, n: int) -> int:
    return min(n, rank + max(8, rank // 2))


def lobpcg(x: jax.Array, rank: int) -> Found:
    """Locally optimal block preconditioned conjugate gradients on XᵀX, one matrix after another."""
    start = jax.random.normal(jax.random.key(0), (x.shape[-1], rank), x.dtype)

    def one(x: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return lobpcg_standard(gram(x), start, m=LOBPCG_PASSES)[1]

    return Found(jax.lax.map(one, x))


ROUTES: dict[str, Callable[[jax.Array, int], Found]] = {
    **{name: functools.partial(packaged, chosen=name) for name in ("svd", "eigh", "subspace")},
    "cholqr": cholqr,
    "lobpcg": lobpcg,
}


class Case(NamedTuple):
    """A batch of matrices, and the true directions of the first one as far as they are known."""

    matrices: np.ndarray
    spectrum: str
    truth: np.ndarray | None
    reference: str


def case(n: int, batch: int, spectrum: str) -> Case:
    """Matrices of one spectrum, and 128 true directions."""
    alpha = SPECTRA[spectrum]
    rank = min(n, max(DIRECTIONS.values()))
    if alpha is None:
        matrices = np.random.default_rng(n).standard_normal((batch, n, n), np.float32)
        built = None
    else:
        made = [shapes.power_law((n, n), seed=(n, i), alpha=alpha, vectors=rank) for i in range(batch)]
        matrices, built = np.stack([matrix for matrix, _ in made]), made[0][1]
    if n <= LARGEST_FLOAT64:
        exact = matrices[0].astype(np.float64)
        return Case(matrices, spectrum, np.linalg.eigh(exact.T @ exact)[1][:, ::-1][:, :rank], "float64")
    return Case(matrices, spectrum, built, "as built" if built is not None else "svd")


def errors(x: np.ndarray, v: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Sine of the largest angle between the spans of `v` and `truth`, and ‖X V‖² / ‖X W‖²."""
    v, x = np.asarray(v, np.float64), x.astype(np.float64)
    missed = truth - v @ (v.T @ truth)
    energy = np.sum((x @ v) ** 2) / np.sum((x @ truth) ** 2)
    return float(np.linalg.norm(missed, 2)), float(energy)


class Bench:
    """Runs routes; knows what each took last, and compiles each once per shape."""

    def __init__(self, repeats: int, budget: float) -> None:
        self._repeats, self._budget = repeats, budget
        self._last: dict[tuple[str, int], tuple[int, float]] = {}  # route, directions -> n, seconds per matrix
        self._programs: dict[Any, tuple[Callable[..., Any], float]] = {}

    def row(self, one: Case, route: str, wanted: int) -> tuple[list[Any], np.ndarray | None]:
        """The table's row, and the first matrix's directions."""
        batch, _, n = one.matrices.shape
        rank = min(n, wanted)
        head = [n, batch, one.spectrum, route]
        if why := self._why_not(route, n, batch, wanted):
            return [*head, *(None,) * 8, why], None
        x = jnp.asarray(one.matrices)
        key = (route, rank, x.shape)
        if key not in self._programs:
            function = jax.jit(lambda x: ROUTES[route](x, rank))
            self._programs[key] = measure.compile_it(function, x)
        program, compile_seconds = self._programs[key]
        found = run_alone(program, x)
        times = measure.time_it(lambda: run_alone(program, x), self._repeats, warm_up=False)
        self._last[route, wanted] = (n, times.median / batch)
        vectors = np.asarray(found.vectors[0])
        broken = not np.isfinite(vectors).all()
        truth = None if one.truth is None else one.truth[:, :rank]
        accuracy = (None, None) if truth is None or broken else errors(one.matrices[0], vectors, truth)
        certified = None if found.certified is None else f"{int(jnp.sum(found.certified))} of {batch}"
        seconds = [compile_seconds, times.minimum, times.median, times.median / batch]
        remark = "broke down: NaN" if broken else ""
        return [*head, *seconds, *accuracy, certified, one.reference, remark], vectors

    def _why_not(self, route: str, n: int, batch: int, wanted: int) -> str:
        if route == "lobpcg" and n <= 5 * wanted:
            return f"needs n > {5 * wanted}"
        size, seconds = self._last.get((route, wanted), (n, 0.0))
        predicted = seconds * (n / size) ** 3 * batch * (self._repeats + 1)
        return f"left out: about {math.ceil(predicted)} s" if predicted > self._budget else ""


def measure_all(
    sizes: list[int], batches: list[int], spectra: list[str], routes: list[str], bench: Bench
) -> dict[str, list[list[Any]]]:
    """Rows of all cases, by directions (V2, V1)."""
    rows: dict[str, list[list[Any]]] = {name: [] for name in DIRECTIONS}
    for one in _cases(sizes, batches, spectra):
        n, batch = one.matrices.shape[-1], len(one.matrices)
        script.say(f"n = {n}, {batch} matrices, {one.spectrum}")
        for name, wanted in DIRECTIONS.items():
            # The SVD first: where nothing better is known, the others are held against it.
            for route in sorted(routes, key=lambda route: route != "svd"):
                row, vectors = bench.row(one, route, wanted)
                rows[name].append(row)
                if one.truth is None and route == "svd" and vectors is not None and name == "V2":
                    one = one._replace(truth=vectors.astype(np.float64))
    return rows


def _cases(sizes: list[int], batches: list[int], spectra: list[str]) -> Iterator[Case]:
    for n in sorted(sizes):
        for batch in batches:
            yield from (case(n, batch, spectrum) for spectrum in spectra)


def main() -> None:
    """Parses the command line."""
    parser = script.Parser(__doc__, "decompositions.json")
    parser.add_argument("--n", type=script.at_least(1), nargs="+", default=list(SIZES), help="widths")
    parser.add_argument("--batch", type=script.at_least(1), nargs="+", default=list(BATCHES), help="matrices at once")
    parser.add_argument(
        "--routes", choices=ROUTES, nargs="+", default=list(ROUTES), metavar="ROUTE", help=", ".join(ROUTES)
    )
    parser.add_argument(
        "--spectra", choices=SPECTRA, nargs="+", default=list(SPECTRA), metavar="SPECTRUM", help=", ".join(SPECTRA)
    )
    parser.add_argument("--repeats", type=script.at_least(1), default=5, help="timed runs (default: 5)")
    parser.add_argument("--budget", type=float, default=300, help="most seconds for the runs of one row (default: 300)")
    options = parser.parse_args()
    environment, neighbours = measure.environment(), measure.Neighbours()
    bench = Bench(options.repeats, options.budget)
    rows = measure_all(options.n, options.batch, options.spectra, options.routes, bench)
    document = {
        "benchmark": "decompositions",
        "dtype": "float32",
        "environment": environment,
        "percent_cpu_of_others": neighbours.percent(),
        "settings": script.settings(options),
        "tables": [
            records.table(f"{name}: {rank} directions", COLUMNS, rows[name]) for name, rank in DIRECTIONS.items()
        ],
    }
    records.finish(document, options.json or records.RESULTS / "decompositions.json")


if __name__ == "__main__":
    main()
