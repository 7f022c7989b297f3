"""Makes the checkpoints of a built-in family: `python -m nufilt_jax.zoo.train study`.

One tower is pre-trained on all tasks at once, on mild images; then one copy per task is fine-tuned on that task's own
images. Models that are there already, made with the same settings, stay. All choices were made on the validation split.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from rich.console import Console
from safetensors import numpy as safetensors

from nufilt_jax.durable import atomic_write
from nufilt_jax.evaluation import Task, evaluate_tasks
from nufilt_jax.zoo.families import FAMILIES, TINY_FAMILY, Family
from nufilt_jax.zoo.store import evaluation_tasks, weights_folder
from nufilt_jax.zoo.training import SEED, TowerParams, initial_params, make_data, make_heads, train_tower

RECORD = "training.json"


def build(family: Family, out: Path, console: Console, *, pretrained: Path | None = None) -> None:
    """Trains, rounds, writes and validates the models that are not there yet.

    Args:
      family: which models.
      out: folder for the weights, the heads and the record of the training.
      console: takes progress and scores.
      pretrained: folder of a family whose tower and pre-training are the same: its base is taken over.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = _open_record(family, out / RECORD)
    if pretrained is not None:
        _take_base(pretrained, out, record)
    heads = make_heads(family)
    atomic_write(out / "heads.safetensors", safetensors.save(heads))
    tasks = evaluation_tasks(family.tasks, split="val", family=family, heads=heads)
    scores = record["validation"]
    if "pretrained" not in scores:
        data = make_data(family, family.tasks, family.nuisance, family.pretrain.n_images)
        key = jax.random.key(SEED)
        base, losses = train_tower(family, initial_params(family, SEED), data, family.pretrain, key)
        scores["pretrained"] = _keep(family, out / "base.safetensors", base, tasks)
        atomic_write(out / RECORD, _json(record))
        console.print(f"pre-trained: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    base = _float32(safetensors.load_file(out / "base.safetensors"))
    for index, task in enumerate(tasks):
        if task.name in scores["individual"]:
            continue
        key = jax.random.fold_in(jax.random.key(SEED + 1), index)
        data = make_data(family, [task.name], family.looks[task.name], family.finetune.n_images)
        tuned, _ = train_tower(
            family, {name: jnp.asarray(value) for name, value in base.items()}, data, family.finetune, key
        )
        scores["individual"] |= _keep(family, out / f"{task.name}.safetensors", tuned, [task])
        atomic_write(out / RECORD, _json(record))
        before, after = scores["pretrained"][task.name], scores["individual"][task.name]
        console.print(f"{task.name}: {before:.3f} before, {after:.3f} after")


def _take_base(source: Path, out: Path, record: dict[str, Any]) -> None:
    """Copies the base of a family that was pre-trained likewise, with its scores, unless there is one already."""
    theirs = json.loads((source / RECORD).read_text())
    alike = all(theirs[key] == record[key] for key in ("seed", "config", "pretrain", "nuisance"))
    if alike and "pretrained" not in record["validation"]:
        atomic_write(out / "base.safetensors", (source / "base.safetensors").read_bytes())
        record["validation"]["pretrained"] = theirs["validation"]["pretrained"]


def _open_record(family: Family, path: Path) -> dict[str, Any]:
    """What an earlier run with the same settings has written, or a new record."""
    settings = {
        "seed": SEED,
        "config": dict(family.config),
        "pretrain": dataclasses.asdict(family.pretrain) | {"nuisance": dataclasses.asdict(family.nuisance)},
        "finetune": dataclasses.asdict(family.finetune),
        "nuisance": {name: dataclasses.asdict(family.looks[name]) for name in family.tasks},
    }
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        record = json.loads(path.read_text())
        if {key: record.get(key) for key in settings} == settings:
            return record
    versions = {"jax": jax.__version__, "numpy": np.__version__}
    return settings | {"validation": {"individual": {}}, "versions": versions}


def _keep(family: Family, path: Path, params: TowerParams, tasks: list[Task] | tuple[Task, ...]) -> dict[str, float]:
    """Writes float16, and scores what a reader gets: from here on only the rounded numbers count."""
    rounded = {name: np.asarray(value).astype(np.float16, order="C") for name, value in params.items()}
    atomic_write(path, safetensors.save(rounded, {"format": "pt"}))
    return evaluate_tasks(_float32(rounded), family.config, tasks)


def _float32(params: dict[str, np.ndarray]) -> dict[str, Float[np.ndarray, "..."]]:
    return {name: value.astype(np.float32) for name, value in params.items()}


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("--out", type=Path, help="folder for the weights; study: by default in this user's cache")
    arguments = parser.parse_args()
    family = FAMILIES[arguments.family]
    if family is TINY_FAMILY and arguments.out is None:
        parser.error(f"{family.name} travels with the package: give a folder for the new one, --out")
    build(family, arguments.out or weights_folder(family), Console(stderr=True))


if __name__ == "__main__":
    main()
