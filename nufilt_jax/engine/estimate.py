"""What a merge will take, before it begins: bytes, disk, seconds."""

import contextlib
import functools
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nufilt_jax.checkpoints import Checkpoint
from nufilt_jax.core.settings import SolveConfig
from nufilt_jax.engine.counts import adam_count, fuse_count, reduce_count
from nufilt_jax.engine.grid import Stack
from nufilt_jax.engine.plan import Plan
from nufilt_jax.linalg.chebyshev import block_width
from nufilt_jax.linalg.dense import matmul
from nufilt_jax.linalg.directions import FULL_WIDTH
from nufilt_jax.methods import find
from nufilt_jax.methods.stacked import total_rank

# Fitted on 2 cores of several kinds; benchmarks/results/end_to_end.json, scale.json and memory*.json hold estimates
# beside runs. Of the rate of large products a whole solve of a ViT-B/32 reached 0.49 and 0.63, one of 7B shapes 0.75.
_SHARE_OF_PRODUCTS = 0.58
_DEGREE = 12  # products with the Gram matrix, of a decomposition by iteration
_EIGH = 60  # times n³ operations at that rate, for all eigenvectors: LAPACK is far from it
_CHECKED = 0.6e9  # bytes per second: read, hashed, and looked through
_MERGED = 0.5e9  # bytes of D per second of methods that treat every number alike
_WRITTEN = 0.5e9  # bytes per second, with what reaches the disk
_START = 2.5  # seconds of imports
_COMPILED = 5.0  # seconds per width of layers, where the compile cache has nothing: cold_start.json has 4.9 to 6.9


def plan_bytes(plan: Plan) -> dict[str, int]:
    """Bytes to read, how many of them are fetched from the Hub first, of the output, and of the state beside it."""
    models = (plan.base, *plan.tasks.values())
    state = sum(row.n_bytes for row in plan.rows)
    fetched = sum(map(_stored, (model for model in models if not model.is_local)))
    # What a rule has to know of the whole model is looked for in passes of their own, see `engine.survey`.
    passes = 1 + plan.n_looks(1)
    if plan.settings.output == "adapter":  # of the base its headers are read, and what is written is D
        read = sum(map(_stored, plan.tasks.values()))
        return {"read": passes * read, "fetch": fetched, "model": state, "state": state}
    return {"read": passes * sum(map(_stored, models)), "fetch": fetched, "model": _stored(plan.base), "state": state}


def _stored(model: Checkpoint) -> int:
    return sum(info.nbytes for info in model.stored)


def plan_disk(plan: Plan, n_bytes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of disk that the merge needs for its output and its state, and that are free there."""
    here = Path.cwd() if plan.out is None else plan.out.parent
    # The folders above an output may be the merge's to make: the nearest one that is there tells of the disk.
    there = next(folder for folder in (here, *here.absolute().parents) if folder.is_dir())
    return {"needed": n_bytes["model"] + n_bytes["state"], "free": shutil.disk_usage(there).free}


def plan_seconds(plan: Plan, n_bytes: Mapping[str, int], rate: float) -> dict[str, float | None]:
    """About how long the run will take: on files, on merging, and apart from these on compiling.

    Args:
      plan: what to do.
      n_bytes: of `plan_bytes`.
      rate: of `products_per_second`.

    Returns:
      None for merging by a method of which the cost is not known here.
    """
    n_left = len(plan.sources) - plan.done
    files = _START + n_bytes["read"] / _CHECKED + (n_bytes["model"] + n_bytes["state"]) / _WRITTEN
    config, state = plan.settings.config, n_bytes["state"]
    solved = n_left - (plan.done == 0)
    if isinstance(config, SolveConfig):
        shapes = ((_solved_shape(stack), len(stack.layers)) for stack in plan.stacks)
        merging = solved * solve_flops(shapes, config) / (_SHARE_OF_PRODUCTS * rate) + n_left * state / _CHECKED
        widths = {stack.shape[-1] for stack in plan.stacks}
        compiling = _COMPILED * len(widths) if solved > 0 else 0.0
    elif find(plan.settings.method).elementwise:
        merging, compiling = n_left * state / _MERGED, 1.0
    else:
        merging, compiling = None, None
    return {"files": files, "merging": merging, "compiling": compiling}


def _solved_shape(stack: Stack) -> tuple[int, ...]:
    """Of a layer, or of the rows that a factored one has."""
    return stack.shape if stack.ranks is None else (total_rank(stack.ranks), stack.shape[-1])


def solve_flops(shapes: Iterable[tuple[tuple[int, ...], int]], config: SolveConfig) -> float:
    """Operations of one task, in floating point, for layers of some shapes [m, n] and their numbers."""
    return sum(n_layers * _layer_flops(shape[0], shape[1], config) for shape, n_layers in shapes if len(shape) == 2)


def _layer_flops(m: int, n: int, config: SolveConfig) -> float:
    factored = 2 * m < n
    stages = reduce_count(m, n, config, factored=factored) + fuse_count(m, n, config)
    if config.closed_form_ridge is None:
        stages += adam_count(m, n, config, factored=factored)
    gram = 0 if factored else m * n * n
    found = sum(gram + _directions(m, n, rank, factored) for rank in (config.filter_rank, config.task_rank) if rank)
    return stages.flops + found


def _directions(m: int, n: int, rank: int, factored: bool) -> float:
    """Operations that find the leading directions and refine them."""
    b = block_width(min(rank, n), n)
    refined = 4 * m * n * b + 2 * m * b * b + 4 * n * b * b + 24 * b**3
    if n <= FULL_WIDTH or b == n:
        return _EIGH * n**3 + refined
    product = 4 * m * n * b if factored else 2 * n * n * b
    return _DEGREE * (product + n * b * b) + refined


def products_per_second(seconds: float = 1.0) -> float:
    """Operations per second of products of large matrices in float32, measured here for about so long.

    By JAX, whose products may run at twice another library's rate or at half of it; by numpy where JAX has no device.
    """
    x = np.full((1024, 1024), 1 / 32, np.float32)
    multiply: Callable[[], Any] = functools.partial(np.matmul, x, x)
    with contextlib.suppress(RuntimeError, AssertionError):  # a plan needs no backend
        y, product = jax.device_put(x), jax.jit(matmul)
        multiply = lambda: jax.block_until_ready(product(y, y))  # noqa: E731
        multiply()  # compiles
    best, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < seconds:
        begun = time.perf_counter()
        multiply()
        best = min(best, time.perf_counter() - begun)  # what else the machine does can only slow it
    return 2 * 1024**3 / best


def estimate(plan: Plan) -> dict[str, Any]:
    """All of it, for `--plan`."""
    n_bytes = plan_bytes(plan)
    seconds = plan_seconds(plan, n_bytes, products_per_second())
    rounded = {what: None if x is None else round(x, 1) for what, x in seconds.items()}
    return {"bytes": n_bytes, "disk": plan_disk(plan, n_bytes), "seconds": rounded}
