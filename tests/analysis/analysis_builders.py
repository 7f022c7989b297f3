"""A document with every part, of random numbers, and a recipe to go with it."""

import numpy as np

from nufilt_jax.analysis.document import Measured, make_document
from nufilt_jax.analysis.losses import TaskLosses
from nufilt_jax.analysis.report import Told

BLOCK = "vision_model.encoder.layers.{}.{}.weight"
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def layer_names(n_blocks=2, parts=PARTS):
    return tuple(BLOCK.format(i, part) for i in range(n_blocks) for part in parts)


def random_measured(n_tasks, methods=("nufilt",), seed=0, n_blocks=2):
    rng = np.random.default_rng(seed)
    layers = layer_names(n_blocks)
    merged = tuple(name for name in layers if "fc2" not in name)

    def losses():
        stability = rng.uniform(0.1, 1, (n_tasks, n_tasks, len(merged)))
        stability[np.tril(np.ones((n_tasks, n_tasks), bool))] = np.nan
        plasticity, size = rng.uniform(0.1, 1, (2, n_tasks, len(merged)))
        return TaskLosses(stability, plasticity, size)

    return Measured(
        images=16,
        layers=layers,
        ranks=(4,) * len(layers),
        random=0.25,
        affinities=rng.uniform(0.2, 0.9, (n_tasks, n_tasks, len(layers))),
        merged_layers=merged,
        losses={name: losses() for name in methods},
    )


def random_forecast(n_tasks, seed=1, n_blocks=2):
    rng = np.random.default_rng(seed)
    layers = layer_names(n_blocks, PARTS[:5])
    quantities = ("removed_share", "restored_share", "drift", "captured_share")

    def step(t):
        rows = {name: dict(zip(quantities, rng.uniform(0, 1, 4).tolist(), strict=True)) for name in layers}
        return {"task": f"{t}", "near_equal_cuts": list(layers[:t]), "layers": rows if t else {}}

    return [step(t) for t in range(n_tasks)]


def random_document(tasks, *, methods=("nufilt",), n_blocks=2):
    rng = np.random.default_rng(2)
    return make_document(
        tasks=tasks,
        method="nufilt",
        forecast=random_forecast(len(tasks), n_blocks=n_blocks),
        accuracies=rng.uniform(0.2, 1, (len(tasks), len(tasks))),
        measured=random_measured(len(tasks), methods, n_blocks=n_blocks),
        missing={},
    )


def empty_document(tasks, missing=None):
    """Of a merge of which nothing is known but that it took place."""
    nothing = {"forecast": [], "accuracies": None, "measured": None, "missing": missing or {}}
    return make_document(tasks=tasks, method="sum", **nothing)


def recipe(tasks):
    """What the report is told of a recipe."""
    sha256 = {"model.safetensors": "ab" * 32}
    settings = {
        "method": "nufilt",
        "seed": 7,
        "layers": None,
        "other_params": "pretrained",
        "format": None,
        "dtype": None,
    }
    return Told(
        steps=[(name, 1.5, {"read": 0.25, "solve": 1.0}) for name in tasks],
        timings={"write_model": 0.5},
        compiled=(3, 2.0),
        inputs=[("base", "models/base", "f00d", sha256), *((name, "models/one", None, sha256) for name in tasks)],
        settings=settings | {"filter_rank": 4, "jax": "0.0.1", "device": "cpu: cpu"},
    )
