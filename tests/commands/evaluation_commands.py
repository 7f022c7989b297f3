"""What the tests of evaluations share: small T5s with tasks of their own, and the commands."""

import json

import numpy as np
import text_models as texts

NAMES = ("alpha", "beta", "gamma")
PIECES = ("▁yes", "▁no", "</s>")
ANSWERS = ("no", "yes")


def write_study(folder, names=NAMES):
    """A T5, models near it, and a file that describes their tasks."""
    base = texts.params(8, PIECES)
    texts.write_model(folder / "base", base)
    described = {}
    for seed, name in enumerate(names, 1):
        texts.write_model(folder / name, texts.params(seed, PIECES, base))
        labels = np.random.default_rng(seed).integers(0, 2, 16).tolist()
        columns = {"words": texts.sentences(16, seed, longest=20), "label": labels}
        texts.write_data(folder / "data" / name, columns, classes=["a", "b"])
        described[name] = {
            "kind": "text",
            "dataset": f"./data/{name}",
            "split": "validation",
            "prompt": "is {words}?",
            "answers": list(ANSWERS),
        }
    (folder / "tasks.json").write_text(json.dumps(described))
    return folder


def merge(study, out, *options, names=NAMES):
    tasks = [part for name in names for part in ("--task", f"{name}={study / name}")]
    argv = ("merge", "--base", study / "base", *tasks, "--out", out, "--method", "task_arithmetic", "--json")
    return (*argv, "--method-args", "scale=0.3", *options)


def with_scores(study, *options):
    return ("--evaluate", "--tasks-file", study / "tasks.json", *options)


def evaluate(study, out, *options):
    return ("evaluate", out, "--tasks-file", study / "tasks.json", "--json", *options)


def read(folder, name="evaluation.json"):
    return json.loads((folder / name).read_text())
