"""Compares ranks of NUFILT on the built-in tasks, by their validation draw: where the preset's ranks come from.

python -m benchmarks.study.tiny_ranks       merges in four orders for every setting and stores the mean accuracies
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from nufilt_jax import methods
from nufilt_jax.config import MethodConfig
from nufilt_jax.evaluation import Task, evaluate_tasks
from nufilt_jax.methods.nufilt import NufiltConfig
from nufilt_jax.methods.null_space import NullSpaceConfig
from nufilt_jax.presets import shuffled
from nufilt_jax.zoo import TASK_NAMES, evaluation_tasks, load_params
from nufilt_jax.zoo.families import TINY_FAMILY

RESULTS = Path(__file__).parents[1] / "results" / "tiny_ranks.json"
ORDERS = (1, 2, 3, 4)
FILTER_RANKS, TASK_RANKS, ADAPTER_RANKS = (16, 24, 32, 48), (4, 16, 32), (8, 24)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to store the results")
    arguments = parser.parse_args()
    rows = sweep(Console())
    arguments.out.write_text(json.dumps({"draw": "validation", "orders": ORDERS, "rows": rows}, indent=1) + "\n")


def sweep(console: Console) -> list[dict[str, Any]]:
    """Mean validation accuracy of every setting, the best first."""
    settings: list[tuple[str, MethodConfig]] = [(name, methods.find(name).config()) for name in ("task_arithmetic",)]
    settings += [("null_space", NullSpaceConfig(filter_rank=rank)) for rank in FILTER_RANKS]
    for filter_rank, task_rank, adapter_rank in itertools.product(FILTER_RANKS, TASK_RANKS, ADAPTER_RANKS):
        ranks = NufiltConfig(filter_rank=filter_rank, task_rank=task_rank, adapter_rank=adapter_rank)
        settings.append(("nufilt", ranks))
    models = {name: load_params(name) for name in ("base", *TASK_NAMES)}
    tasks = evaluation_tasks(TASK_NAMES, split="val")
    rows = []
    for method, config in settings:
        accuracies = [_accuracy(methods.get(method, config), models, tasks, order) for order in ORDERS]
        ranks = {key: value for key, value in vars(config).items() if key.endswith("rank")}
        rows.append({"method": method, **ranks, "mean": float(np.mean(accuracies)), "by_order": accuracies})
        console.print(rows[-1])
    return sorted(rows, key=lambda row: -row["mean"])


def _accuracy(
    rule: methods.Merger, models: dict[str, dict[str, np.ndarray]], tasks: tuple[Task, ...], order: int
) -> float:
    state = rule.init(models["base"])
    for name in shuffled(TASK_NAMES, order):
        state = rule.update(state, models[name])
    merged = {name: np.asarray(value) for name, value in state.merged.items()}
    return float(np.mean(list(evaluate_tasks(merged, TINY_FAMILY.config, tasks).values())))


if __name__ == "__main__":
    main()
