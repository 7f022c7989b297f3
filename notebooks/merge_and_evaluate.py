# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Merge fine-tuned models one after another, without data
#
# NUFILT (Qiu et al., [arXiv:2509.21413v2](https://arxiv.org/abs/2509.21413v2)) by `nufilt_jax`. This notebook plans a
# merge, runs it, evaluates the model after every step, adds one more task and compares three methods. It runs on the
# built-in checkpoints in about a minute, without a GPU and without downloads; another `MODEL` takes the paper's.
#
# On Colab, choose a CPU, GPU or TPU runtime, set `PROJECT` to a copy of the project, to its `git+https://` address or
# to nothing for PyPI, and run all cells. The JAX of a GPU or TPU runtime is kept. If pip says that it is too old, put
# `cuda` or `tpu` into `EXTRAS`: pip then brings the JAX that fits, and the runtime has to be restarted.

# %%
import importlib.util
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PROJECT = ".."  # a folder, git+https://..., or "" for the release on PyPI
EXTRAS = "eval,plots"  # eval,plots,cuda or eval,plots,tpu for another JAX than the one there

if importlib.util.find_spec("nufilt_jax") is None:
    place = PROJECT if not PROJECT or "://" in PROJECT else Path(PROJECT).resolve().as_uri()
    wanted = f"nufilt_jax[{EXTRAS}]" + (f" @ {place}" if place else "")
    installed = [name for name in ("jax", "jaxlib") if importlib.util.find_spec(name) and EXTRAS == "eval,plots"]
    kept = [f"{name}=={version(name)}" for name in installed]
    subprocess.run([sys.executable, "-m", "pip", "install", wanted, *kept], check=True)

# %% [markdown]
# ## What to merge
#
# `MODEL` is all that has to be changed. The paper's checkpoints and the test images of their tasks come from the
# Hugging Face Hub; a task's data set is downloaded whole, whatever `LIMIT` says.

# %%
import os

MODEL = "tiny"  # or: vit-b32 vit-b16 vit-l14 flan-t5-base
LIMIT = 20 if os.environ.get("NOTEBOOK_FAST") else 500  # test examples of each task, at most
OUT = Path("merged") / MODEL

# %% [markdown]
# The commands below are those of the command line, `python -m nufilt_jax.merge` and `nufilt`. They run in this process,
# since a TPU serves one process at a time.

# %%
import contextlib
import io
import json

import pandas as pd
from IPython.display import Image

from nufilt_jax.cli import main


def nufilt(*arguments):
    """Runs a command and returns the JSON document that it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main([*map(str, arguments), "--json"])
    if status:
        raise RuntimeError("the command was refused: see the lines above")
    return json.loads(printed.getvalue())


# %% [markdown]
# ## Plan
#
# A plan reads headers alone. It lists all problems that these can tell of, before any work starts, and says which
# matrices are merged.

# %%
plan = nufilt("plan", "--model", MODEL)
print("tasks:", ", ".join(task["name"] for task in plan["tasks"]))
pd.DataFrame([{"layers": row["layers"], "shape": "{} x {}".format(*row["shape"])} for row in plan["stacks"]])

# %% [markdown]
# ## Merge and evaluate
#
# The merged model is measured on all tasks after every step. The same command again resumes, or says that all is done.

# %%
merged = nufilt("merge", "--model", MODEL, "--evaluate", "--limit", LIMIT, "--out", OUT / "nufilt")


def accuracies(models):
    """Accuracy on each task, with ACC and BWT of the sequence of merges, all in percent."""
    rows = {row["name"]: {**row["accuracy"], "ACC": row["acc"], "BWT": row["bwt"]} for row in models}
    return (100 * pd.DataFrame(rows, dtype=float).T).round(1).astype(object).fillna("")


accuracies(merged["evaluation"]["models"])

# %% [markdown]
# Each row is a model. ACC is the mean accuracy after the last step; BWT is the mean change of a task's accuracy since
# it was merged, negative where the model forgets.
#
# The next picture shows accuracy on every task (rows) after every step (columns). To the right of the diagonal stand
# tasks that are merged already, in bold: a row that grows darker to the right is being forgotten.

# %%
Image(OUT / "nufilt" / "accuracy_matrix.png")

# %% [markdown]
# ## The forecast
#
# Written down during the merge, without any data. Each row is a step, each column a layer: the share of the task vector
# that the filter removed and that the adapter put back, the drift of the answers to earlier tasks, and how much of what
# is merged the kept directions hold. What the filter let through says most of what a step will cost
# (`benchmarks/study/STUDY.md`). `nufilt analyze FOLDER` makes a page of all this.

# %%
from nufilt_jax.analysis import forecast, plots
from nufilt_jax.analysis.figures import as_png

steps = json.loads((OUT / "nufilt" / "forecast.json").read_text())["steps"]
layers = forecast.forecast_layers(steps)
values = {quantity: forecast.forecast_values(steps, quantity, layers) for quantity in forecast.QUANTITIES}
Image(as_png(plots.forecast_figure(values, layers, [step["task"] for step in steps])))

# %% [markdown]
# ## Add one more task
#
# A model that arrives later is merged into the finished result, without the earlier ones. Here all tasks but the last
# are merged from their folders or Hub ids, then the last is added. The result is that of the merge above.
#
# Your own checkpoints go the same way, and LoRA adapters too: `merge_your_own.ipynb` and `merge_lora.ipynb` are about
# them.

# %%
import numpy as np

import nufilt_jax as nj

usual = nj.NufiltConfig()
settings = [f"{key}={value}" for key, value in merged["config"].items() if getattr(usual, key) != value]
options = ["--method-args", *settings] if settings else []
sources = [
    "{name}={source}{at}".format(**task, at=f"@{task['revision']}" if task["revision"] else "")
    for task in merged["tasks"]
]
base = merged["base"]["source"] + (f"@{merged['base']['revision']}" if merged["base"]["revision"] else "")
earlier = [word for source in sources[:-1] for word in ("--task", source)]

nufilt("merge", "--base", base, *earlier, *options, "--out", OUT / "added")
added = nufilt("merge", "--add", OUT / "added", "--task", sources[-1])
whole, grown = nj.load(str(OUT / "nufilt")), nj.load(str(OUT / "added"))
print("steps:", ", ".join(step["task"] for step in added["steps"]))
print("same weights:", all(np.array_equal(whole[name], grown[name]) for name in whole))

# %% [markdown]
# ## Compare methods
#
# `nufilt plan --model tiny --method help` lists all methods, and `--method help=NAME` tells of one with its settings
# (with `--json`, `help` tells those of all). The built-in checkpoints are small, and so are the differences between
# merges on so few images; the paper's tables are about the larger ones.

# %%
METHODS = ("opcm", "task_arithmetic", "nufilt")

rows = []
for method in METHODS:
    told = nufilt("merge", "--model", MODEL, "--method", method, "--evaluate", "--limit", LIMIT, "--out", OUT / method)
    rows += [row for row in told["evaluation"]["models"] if row["name"] == method]
accuracies(rows)
