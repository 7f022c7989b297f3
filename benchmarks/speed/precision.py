"""Times one task's solve with its products on tensor cores, in all stages and in one at a time.

Tensor cores come near float32 by several products of shorter numbers; `benchmarks.speed.products` has single ones.
Whether a stage can do with that, its updates tell, beside those of true float32, and how many layers get a certificate.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks.common import measure, records, script, shapes
from benchmarks.common.shapes import Inputs
from benchmarks.speed.package_solve import Merge
from benchmarks.speed.products import HIGHEST, PRESETS, precision_of
from benchmarks.speed.solve import add_problem_options, difference
from nufilt_jax.core import solve
from nufilt_jax.linalg import dense, subspace
from nufilt_jax.methods.nufilt import NufiltConfig

TITLE = "One task's solve by the algorithm of its products"
COLUMNS = ("products of", "algorithm", "compile s", "min ms", "largest difference", "certified layers", "remark")
ALL = "all stages"
# Where the functions of a stage are called from.
STAGES: dict[str, tuple[tuple[Any, str], ...]] = {
    "polynomial": ((subspace, "leading_block"),),
    "refinement": ((subspace, "refine"),),
    "gram": ((subspace, "gram_of"), (solve, "gram_of")),
    "reduce": ((solve, "reduce"),),
    "adam": ((solve, "train"),),
    "fuse": ((solve, "fuse_updates"),),
}


@contextlib.contextmanager
def products_by(name: str, stages: tuple[str, ...]) -> Iterator[None]:
    """Programs that are traced inside have the products of these stages by one algorithm, all others in float32."""

    def traced_so(function: Any) -> Any:
        def call(*args: Any, **how: Any) -> Any:
            with mock.patch.object(dense, "PRECISION", precision_of(name)):
                return function(*args, **how)

        return call

    with contextlib.ExitStack() as patched:
        for module, function in (place for stage in stages for place in STAGES[stage]):
            new = traced_so(getattr(module, function))
            patched.enter_context(mock.patch.object(module, function, new))
        jax.clear_caches()  # what was traced for another algorithm
        yield


def run(inputs: Inputs, config: NufiltConfig, algorithms: list[str], repeats: int) -> list[list[Any]]:
    """A row for float32, and one for each algorithm in all stages and in each."""
    exact: dict[str, np.ndarray] = {}
    rows = []
    cases = [(ALL, tuple(STAGES), name) for name in (HIGHEST, *algorithms)]
    cases += [(stage, (stage,), name) for name in algorithms for stage in STAGES]
    for told, stages, name in cases:
        script.say(f"{told}: {name}")
        try:
            with products_by(name, stages):
                merge = Merge([inputs], config)
                least, (updates, certified) = merge.times(repeats).minimum, merge.results()
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError, ArithmeticError) as error:
            rows.append([told, name, None, None, None, None, str(error).splitlines()[0][:80]])
            continue
        exact = exact or updates
        apart = max(difference(x, exact[layer]) for layer, x in updates.items())
        rows.append([told, name, merge.compile_seconds, 1e3 * least, apart, certified, ""])
    return rows


def main() -> None:
    """Parses the command line and runs."""
    script.prepare_process()
    parser = script.Parser(__doc__, "precision_PLATFORM.json")
    parser.add_argument("--model", choices=shapes.MODELS, default="vit-b32", metavar="MODEL", help="default: vit-b32")
    add_problem_options(parser)
    parser.add_argument(
        "--algorithms",
        nargs="+",
        choices=PRESETS,
        default=["TF32_TF32_F32_X3", "BF16_BF16_F32_X6"],
        metavar="NAME",
        help=", ".join(PRESETS) + " (default: TF32_TF32_F32_X3 BF16_BF16_F32_X6)",
    )
    options = parser.parse_args()
    config = NufiltConfig(decomposition=options.decomposition)
    layers = shapes.layer_shapes(options.model, options.layers)
    inputs = shapes.inputs(layers, config.adapter_rank, alpha=options.alpha)
    table = records.table(TITLE, COLUMNS, run(inputs, config, options.algorithms, options.repeats))
    measure.finish({"layers": shapes.shape_counts(layers.values()), "tables": [table]}, options, "precision")


if __name__ == "__main__":
    main()
