"""The paper's published numbers (arXiv:2509.21413v2), read from benchmarks/paper."""

import csv
from pathlib import Path
from typing import NamedTuple

PAPER = Path(__file__).parents[1] / "paper"
BACKBONES = {"vit-b32": "ViT-B/32", "vit-b16": "ViT-B/16", "vit-l14": "ViT-L/14"}
# Names of the tables' rows, by ours.
NAMES = {
    "weight_average": "Weight Averaging",
    "task_arithmetic": "Task Arithmetic",
    "ties": "Ties-Merging",
    "magmax": "MagMax-Ind",
    "adamerging": "LW AdaMerging",
    "wemoe": "LoRA-WEMOE",
    "wudi": "WUDI-Merging",
    "iso_c": "Iso-C",
    "knots": "KnOTS-TIES",
    "tsv_m": "TSV-M",
    "opcm": "OPCM",
    "nufilt": "NUFILT",
    "pre-trained": "Pre-Trained",
    "individual": "Individual",
}
ABLATION = {
    "sum": "Naive Merging",
    "null_space": "Only Null-space",
    "adapter_only": "Data-free Objective w/o null-space filter",
    "nufilt": "Data-free Objective full method",
}
Score = tuple[float, float | None]  # mean and, where there is one, standard deviation


def main_results(backbone: str, n_tasks: int) -> dict[tuple[str, str], Score]:
    """Table 1 by (our name, metric), in percent."""
    return _scores("table1_main.csv", NAMES, {"backbone": backbone, "n_tasks": str(n_tasks)})


def ablation(n_tasks: int) -> dict[tuple[str, str], Score]:
    """Table 4, of ViT-B/32, by (our name, metric), in percent."""
    return _scores("table4_ablation.csv", ABLATION, {"n_tasks": str(n_tasks)})


def glue() -> dict[tuple[str, str], float]:
    """Table 2 by (our name, GLUE task in lower case, or ACC or BWT), in percent."""
    ours = _ours(NAMES)
    return {
        (ours[row["method"]], row["task"] if row["task"] in ("ACC", "BWT") else row["task"].lower()): float(
            row["value"]
        )
        for row in _rows("table2_flan_t5_glue.csv")
        if row["value"] and row["method"] in ours
    }


def per_task(backbone: str) -> dict[tuple[str, str], float]:
    """Table 10, 20 tasks, by (our name, data set), in percent."""
    ours = _ours(NAMES)
    rows = (row for row in _rows("table10_per_task_20.csv") if row["backbone"] == backbone and row["method"] in ours)
    return {(ours[row["method"]], row["dataset"]): float(row["accuracy"]) for row in rows}


class Overhead(NamedTuple):
    """A row of Table 5; None where the paper gives no number."""

    model: str
    iterations: int | None
    solve_s: float | None
    total_s: float
    parameters: float  # millions
    acc: str  # percent, mean ± standard deviation


def overhead() -> list[Overhead]:
    """Table 5, ViT-B/32, 8 tasks."""
    return [
        Overhead(
            row["model"],
            int(row["iters"]) if row["iters"] else None,
            float(row["solve_s"]) if row["solve_s"] else None,
            float(row["total_s"]),
            float(row["params_m"]),
            f"{row['acc']} ± {row['acc_std']}",
        )
        for row in _rows("table5_overhead.csv")
    ]


def _scores(file: str, names: dict[str, str], where: dict[str, str]) -> dict[tuple[str, str], Score]:
    ours = _ours(names)
    return {
        (ours[row["method"]], row["metric"]): (float(row["mean"]), float(row["std"]) if row["std"] else None)
        for row in _rows(file)
        if row["method"] in ours and all(row[key] == value for key, value in where.items())
    }


def _ours(names: dict[str, str]) -> dict[str, str]:
    """Our names by the paper's."""
    return {theirs: name for name, theirs in names.items()}


def _rows(file: str) -> list[dict[str, str]]:
    with (PAPER / file).open(newline="") as opened:
        return list(csv.DictReader(opened))
