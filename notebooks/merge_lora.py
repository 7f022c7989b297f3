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
# # Merge LoRA adapters, without data
#
# LoRA adapters of one base are merged one after another by NUFILT (Qiu et al.,
# [arXiv:2509.21413v2](https://arxiv.org/abs/2509.21413v2)): into a whole model, and into one adapter that `peft` loads.
# Neither `peft` nor `torch` is needed for it. The adapters are made here, out of the built-in checkpoints; your own are
# named in `ADAPTERS`.
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
# `MODEL` gives the base, and three fine-tunes of it that become adapters. To merge your own, fill in `BASE` and
# `ADAPTERS`: folders or Hub ids, as `"math": "someone/lora-math@main"`. An adapter is a folder with
# `adapter_config.json` and `adapter_model.safetensors`; plain LoRA and rsLoRA are read, all else is refused.

# %%
import os

MODEL = "tiny"  # or: vit-b32 vit-b16 vit-l14
LIMIT = 20 if os.environ.get("NOTEBOOK_FAST") else 500  # test examples of each task, at most
RANK = 8  # of the adapters that are made here
BASE = ""
ADAPTERS = {}
OUT = Path("merged") / MODEL / "lora"

# %%
import contextlib
import io
import json

import pandas as pd
from IPython.display import Image

from nufilt_jax.cli import main


def nufilt(*arguments):
    """Runs a command of the command line in this process and returns the JSON document that it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main([*map(str, arguments), "--json"])
    if status:
        raise RuntimeError("the command was refused: see the lines above")
    return json.loads(printed.getvalue())


# %% [markdown]
# ## An adapter of a whole model
#
# `nufilt extract MODEL --base BASE --rank 8 --out FOLDER` writes the best LoRA of that rank of what a model changed in
# its base. The table says how much of that change each layer's factors keep, in percent of its squared norm. (The merge
# at the start brings the checkpoints here, and the accuracies of the models that the adapters are made of.)

# %%
import nufilt_jax as nj


def address(model):
    """A model as the command line takes it: a folder or Hub id, at its revision."""
    return model["source"] + (f"@{model['revision']}" if model["revision"] else "")


kept, settings, rows = {}, [], {}
if not ADAPTERS:
    preset = nufilt("plan", "--model", MODEL)["config"]
    usual = nj.NufiltConfig()
    settings = [f"{key}={value}" for key, value in preset.items() if getattr(usual, key) != value]
    how = ["--method", "sum", "--evaluate", "--limit", LIMIT, "--out", OUT / "models"]
    models = nufilt("merge", "--model", MODEL, *how)
    BASE = address(models["base"])
    for task in models["tasks"][1:4]:
        ADAPTERS[task["name"]] = folder = OUT / "adapters" / task["name"]
        if not folder.exists():
            nufilt("extract", address(task), "--base", BASE, "--rank", RANK, "--out", folder)
        layers = json.loads((folder / "extract.json").read_text())["layers"]
        kept[task["name"]] = {x["module"].removeprefix("vision_model.encoder."): 100 * x["kept"] for x in layers}
    rows = {
        x["name"]: x["accuracy"] for x in models["evaluation"]["models"] if x["name"] in ("pre-trained", "individual")
    }
pd.DataFrame(kept).round(1)

# %% [markdown]
# ## Merge them into a model
#
# Adapters are tasks like any other, alone or beside whole models. The settings are the preset's; a base of your own
# begins with the usual ones. The first two rows are of the whole models, before anything was made small or merged. A
# task's name says what it is measured on; of names that are not known, a `--tasks-file` tells.

# %%
METHODS = ("task_arithmetic", "opcm", "nufilt")

tasks = [word for name, source in ADAPTERS.items() for word in ("--task", f"{name}={source}")]
for method in METHODS:
    options = ["--method-args", *settings] if method == "nufilt" and settings else []
    how = ["--method", method, *options, "--evaluate", "--limit", LIMIT, "--out", OUT / method]
    [found] = nufilt("merge", "--base", BASE, *tasks, *how)["evaluation"]["models"]
    rows[method] = found["accuracy"]
accuracies = 100 * pd.DataFrame(rows).T[list(ADAPTERS)]
accuracies.assign(mean=accuracies.mean(axis=1)).round(1)

# %% [markdown]
# The picture shows NUFILT's model on every task (rows) after every step (columns). To the right of the diagonal stand
# tasks that are merged already, in bold: a row that grows darker to the right is being forgotten.

# %%
Image(OUT / "nufilt" / "accuracy_matrix.png")

# %% [markdown]
# ## Merge them into one adapter
#
# With `--output adapter` the result is a LoRA of the base again. The base's weights are not read for it: the merge
# works in the adapters' factors, and no matrix of a layer's size is made. Its rank is that of the tasks added up. Base
# and adapter together are the merged model from above, to rounding.

# %%
import numpy as np
from safetensors.numpy import load_file

options = ["--method-args", *settings] if settings else []
nufilt("merge", "--base", BASE, *tasks, *options, "--output", "adapter", "--out", OUT / "adapter")
adapter_config = json.loads((OUT / "adapter" / "adapter_config.json").read_text())
factors = load_file(OUT / "adapter" / "adapter_model.safetensors")
scale = adapter_config["lora_alpha"] / adapter_config["r"]

base, merged = nj.load(BASE), nj.load(str(OUT / "nufilt"))
changes, largest = {}, 0.0
for name, a in factors.items():
    if ".lora_A." in name:
        layer = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        changes[layer] = scale * factors[name.replace(".lora_A.", ".lora_B.")] @ a
        whole = np.asarray(merged[layer], np.float32) - np.asarray(base[layer], np.float32)
        largest = max(largest, np.linalg.norm(changes[layer] - whole) / np.linalg.norm(whole))
print(f"rank {adapter_config['r']}, {len(changes)} layers, the same change as the model's: {largest < 1e-3}")

# %% [markdown]
# Where `peft` is installed, `PeftModel.from_pretrained(base, folder)` loads it onto the base as a `transformers` model.
#
# ## How much rank it needs
#
# Each curve is a layer: the share of the merged change that its best adapter of a lower rank keeps.
# `--adapter-out-rank` cuts it there, and says how much that loses over all layers.

# %%
from nufilt_jax.analysis.figures import as_png, new_figure

figure = new_figure(7.0, 4.0)
axes = figure.add_subplot()
for change in changes.values():
    energy = np.cumsum(np.linalg.svd(change, compute_uv=False)[: adapter_config["r"]] ** 2)
    axes.plot(range(1, len(energy) + 1), 100 * energy / energy[-1], color="#0072B2", alpha=0.6)
axes.axvline(adapter_config["r"] // 2, color="black", linestyle=":")
axes.set_xlabel("rank of the adapter (dotted: half of the merged one)")
axes.set_ylabel("energy kept, %")
axes.set_ylim(0, 101)
axes.grid(alpha=0.3)
Image(as_png(figure))

# %%
half = adapter_config["r"] // 2
cut = ["--output", "adapter", "--adapter-out-rank", half, "--out", OUT / f"adapter-{half}"]
nufilt("merge", "--base", BASE, *tasks, *options, *cut)
lost = json.loads((OUT / f"adapter-{half}" / "nufilt.json").read_text())["adapter"]["energy_lost"]
print(f"cut to rank {half}: {100 * (1 - lost):.1f} % of the energy kept")

# %% [markdown]
# The same of a finished merge, whatever it was merged from: `nufilt extract` again.

# %%
found = nufilt("extract", OUT / "nufilt", "--base", BASE, "--rank", half, "--out", OUT / f"extracted-{half}")
print(f"extracted at rank {half}: {100 * found['kept']:.1f} % of the energy kept")
