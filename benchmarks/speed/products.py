"""Times and errors of float32 products by every algorithm that a device offers for them, at the shapes of a solve.

The package asks for `highest`, which is true float32. Tensor cores come near it by several products of shorter numbers;
which of these algorithms a device has, it says itself. Errors are relative Frobenius norms, against float64.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import measure, records, script

TITLE = "Float32 products by algorithm"
COLUMNS = ("shapes", "algorithm", "min ms", "TFLOP/s", "relative error", "remark")
# Batch, rows, inner, columns: the polynomial, a Gram matrix, an Adam step of ViT-B/32, one layer of 7B.
SHAPES = ((12, 768, 768, 192), (12, 768, 3072, 768), (60, 768, 768, 64), (1, 4096, 4096, 192))
HIGHEST = "highest"
PRESETS = ("F32_F32_F32", "TF32_TF32_F32", "TF32_TF32_F32_X3", "BF16_BF16_F32_X3", "BF16_BF16_F32_X6")
PRESETS += ("BF16_BF16_F32_X9",)


def precision_of(name: str) -> Any:
    """What a product is asked for by this name."""
    return jax.lax.Precision.HIGHEST if name == HIGHEST else jax.lax.DotAlgorithmPreset[name]


def row(shape: tuple[int, int, int, int], name: str, repeats: int) -> list[Any]:
    """One algorithm on one shape; where the device does not have it, why."""
    batch, m, k, n = shape
    told = f"{batch} x [{m}, {k}] [{k}, {n}]"
    a, b = (jax.random.normal(jax.random.key(i), (batch, *s), jnp.float32) for i, s in enumerate(((m, k), (k, n))))
    program = jax.jit(functools.partial(jnp.matmul, precision=precision_of(name)))
    try:
        found = np.asarray(jax.block_until_ready(program(a, b))[0], np.float64)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        return [told, name, None, None, None, str(error).splitlines()[0][:80]]
    least = measure.time_it(lambda: program(a, b), repeats).minimum
    exact = np.asarray(a[0], np.float64) @ np.asarray(b[0], np.float64)
    error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    return [told, name, 1e3 * least, 2e-12 * batch * m * k * n / least, error, ""]


def main() -> None:
    """Parses the command line and runs."""
    parser = script.Parser(__doc__, "products_PLATFORM.json")
    parser.add_argument("--repeats", type=script.at_least(1), default=20, help="timed runs (default: 20)")
    options = parser.parse_args()
    script.prepare_process()
    found = [row(shape, name, options.repeats) for shape in SHAPES for name in (HIGHEST, *PRESETS)]
    measure.finish({"tables": [records.table(TITLE, COLUMNS, found)]}, options, "products")


if __name__ == "__main__":
    main()
