"""Which layers of each family are merged, what is left as it was, and how exact the merge is.

Tiny models in the names and layouts that transformers 4.57 and 5 store (tests/architectures): a base and two tasks, all
of whose floating tensors moved, merged by NUFILT on the command line and held against the float64 oracle of the tests.
"Kept" is the share of the tasks' squared change that lies in the selected layers. Where transformers and torch are at
hand, the merged folder is opened in its own class, which must miss nothing and leave nothing over.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.common import measure, records, script
from nufilt_jax.cli import main as command
from nufilt_jax.methods import nufilt

TESTS = records.ROOT / "tests"
COLUMNS = ("family", "stored by", "layers", "as expected", "tensors left", "kept", "largest error", "opens")
FILTER_RANK, ADAPTER_RANK, TASK_RANK, STEPS = 4, 2, 2, 4
SEED = 0

Tensors = dict[str, np.ndarray]


def from_tests(name: str) -> Any:
    """A module of the tests: models and oracle are theirs, and share no code with the package."""
    for folder in (TESTS, TESTS / "architectures"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return importlib.import_module(name)


def row(entry: Any, folder: Path) -> list[Any]:
    """Merges one family in a folder; its row of the table."""
    arch = from_tests("architecture_models")
    models: Sequence[Tensors] = arch.write_trio(folder, entry.stored(), entry.config)
    ranks = ("--filter-rank", FILTER_RANK, "--adapter-rank", ADAPTER_RANK, "--task-rank", TASK_RANK, "--steps", STEPS)
    argv = arch.merge_command(folder, *map(str, ranks))
    layers = json.loads(run([*argv, "--plan", "--json"]))["layers_selected"]
    run([*argv, "--quiet"])
    merged, _ = arch.weights(folder / "out")
    selected = {layer.partition("[")[0] for layer in layers}
    left = [name for name, x in models[0].items() if x.dtype.kind == "f" and name not in selected]
    errors = [error(entry, layer, models, merged) for layer in layers]
    return [
        entry.family,
        source(entry),
        len(layers),
        "yes" if sorted(layers) == sorted(entry.layers) else "no",
        len(left),
        kept(models, selected),
        max(errors),
        opens(entry, folder / "out"),
    ]


def run(argv: list[str]) -> str:
    """The package's command in this process; what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = command(argv)
    if status:
        raise SystemExit(status)  # it has said why on stderr
    return said.getvalue()


def source(entry: Any) -> str:
    """Which library writes this layout."""
    return "timm" if entry.family == "timm" else f"transformers {entry.series}"


def error(entry: Any, layer: str, models: Sequence[Tensors], merged: Tensors) -> float:
    """‖found − wanted‖ / ‖wanted‖ of one layer's whole update."""
    oracle = from_tests("oracle")
    base, first, second = (entry.matrix(model, layer) for model in models)
    d, tau = first - base, second - base
    start = nufilt.normal_start(jnp.asarray(nufilt.adapter_keys(SEED, 2, (layer,))[0]), ADAPTER_RANK, d.shape[1])
    ranks = {"filter_rank": FILTER_RANK, "task_rank": TASK_RANK, "steps": STEPS}
    wanted = d + oracle.nufilt_update(d, tau, start, **ranks)[0]
    found = entry.matrix(merged, layer) - base
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def kept(models: Sequence[Tensors], selected: set[str]) -> float:
    """Share of the tasks' squared change in the selected tensors."""
    base, *tasks = models
    change = {
        name: sum(float(np.sum((task[name].astype(np.float64) - x) ** 2)) for task in tasks)
        for name, x in base.items()
        if x.dtype.kind == "f"
    }
    return sum(change[name] for name in selected) / sum(change.values())


def opens(entry: Any, folder: Path) -> str | None:
    """Whether the class that wrote the layout reads it whole; None where it is not installed."""
    if entry.family == "timm" or not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        return None
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arch = from_tests("architecture_models")
    kind = getattr(transformers, arch.FAMILIES[entry.family][entry.series]["class"])
    _, problems = kind.from_pretrained(folder, output_loading_info=True)
    return "no" if any(problems.values()) else "yes"


def main() -> None:
    """Parses the command line."""
    parser = script.Parser(__doc__, "architectures.json")
    entries = from_tests("architecture_models").ENTRIES
    families = sorted({entry.family for entry in entries})
    told: Any = {"metavar": "FAMILY", "help": ", ".join(families)}
    parser.add_argument("--families", choices=families, nargs="+", default=families, **told)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows = []
    for entry in entries:
        if entry.family in options.families:
            script.say(f"{entry.family}, {source(entry)}")
            with tempfile.TemporaryDirectory() as folder:
                rows.append(row(entry, Path(folder)))
    document = {
        "benchmark": "architectures",
        "dtype": "float32",
        "environment": measure.environment("transformers", "safetensors"),
        "settings": {"filter_rank": FILTER_RANK, "adapter_rank": ADAPTER_RANK, "task_rank": TASK_RANK, "steps": STEPS}
        | {"families": options.families},
        "tables": [records.table("Layers merged of each family", COLUMNS, rows)],
    }
    records.finish(document, options.json or records.RESULTS / "architectures.json")


if __name__ == "__main__":
    main()
