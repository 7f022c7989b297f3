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
# # Merge your own checkpoints, from the Hub or from folders
#
# A base and fine-tunes of it, of any architecture that `transformers` writes as safetensors, become one model by
# NUFILT (Qiu et al., [arXiv:2509.21413v2](https://arxiv.org/abs/2509.21413v2)), without data: a plan before anything is
# downloaded, the merge, a task that arrives later, a look at what it cost, and an upload that is only tried. As long as
# `BASE` is empty, built-in checkpoints stand in for yours, and nothing is downloaded.
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
# `BASE` and `TASKS` are folders or Hub ids, these with `@` and a branch, tag or commit if it matters:
# `BASE = "org/base"`, `TASKS = {"math": "org/base-math@main", "code": "/models/base-code"}`. For models behind a login,
# run `hf auth login` first. The order is that of merging; the last task stands for one that arrives later.
#
# The published ranks are for layers of width 768 and more. `SETTINGS` has others, as `["filter_rank=64"]`.

# %%
BASE = ""
TASKS = {}
SETTINGS = []
MEMORY = "4GB"  # the most that the merge may take of the machine's memory
OUT = Path("merged") / "own"

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


if not BASE:
    built_in = nufilt("merge", "--model", "tiny", "--method", "sum", "--out", OUT / "stand-in")
    BASE = built_in["base"]["source"]
    TASKS = {task["name"]: task["source"] for task in built_in["tasks"][:3]}
    SETTINGS = ["filter_rank=16", "adapter_rank=8", "task_rank=4"]

# %% [markdown]
# ## Plan
#
# From headers alone, some kB of each file. What these can tell is told now, all problems at once: a tensor of another
# shape, a quantised file. `plan["disk"]` has what is needed of the disk and what is free; numbers that are not finite
# show when the weights are read. Which matrices are merged is decided by what they are, not by a list of known models;
# what is not among them stays the base's, and is named with how much of the model it is.

# %%
tasks = [["--task", f"{name}={source}"] for name, source in TASKS.items()]
options = ["--max-memory", MEMORY, *(["--method-args", *SETTINGS] if SETTINGS else [])]
earlier = [word for words in tasks[:-1] for word in words]

plan = nufilt("plan", "--base", BASE, *earlier, *options)
print(f"{len(plan['layers_selected'])} matrices, {plan['kept_from_base']} tensors stay the base's")
print(f"memory: at most {plan['memory']['planned'] / 1e9:.2f} GB")
pd.DataFrame([{"layers": row["layers"], "shape": "{} x {}".format(*row["shape"])} for row in plan["stacks"]])

# %% [markdown]
# ## Merge
#
# The same command again goes on where it was interrupted, or says that all is done. The folder is a model folder as the
# base's, with its configuration and tokenizer.

# %%
merged = nufilt("merge", "--base", BASE, *earlier, *options, "--out", OUT / "merged")
sorted(path.name for path in (OUT / "merged").iterdir())

# %% [markdown]
# ## A task that arrives later
#
# `add` needs the base and the new fine-tune, and none of the earlier ones.

# %%
grown = nufilt("add", OUT / "merged", *tasks[-1])
print("steps:", ", ".join(step["task"] for step in grown["steps"]))

# %% [markdown]
# ## What it cost
#
# Written down while merging, without any data: what share of each task vector the filter removed and the adapter put
# back, how far the answers to earlier tasks drift, and how much of what is merged the kept directions hold. Layers in
# which much is removed are those that the tasks want for themselves. To measure accuracy on examples of your own, see
# the how-to on evaluation.

# %%
from nufilt_jax.analysis import forecast, plots
from nufilt_jax.analysis.figures import as_png

steps = json.loads((OUT / "merged" / "forecast.json").read_text())["steps"]
layers = forecast.forecast_layers(steps)
values = {quantity: forecast.forecast_values(steps, quantity, layers) for quantity in forecast.QUANTITIES}
Image(as_png(plots.forecast_figure(values, layers, [step["task"] for step in steps])))

# %% [markdown]
# How far each layer is from the base now, beside what the tasks asked for: the norm of the merged change over that of
# all task vectors together.

# %%
import numpy as np

import nufilt_jax as nj

base, whole = nj.load(BASE), nj.load(str(OUT / "merged"))
models = [nj.load(source) for source in TASKS.values()]
rows = []
for name in plan["layers_selected"]:
    vectors = [np.asarray(model[name], np.float32) - np.asarray(base[name], np.float32) for model in models]
    change = np.asarray(whole[name], np.float32) - np.asarray(base[name], np.float32)
    asked_for = float(np.sqrt(sum(np.sum(vector**2) for vector in vectors)))
    rows.append({"layer": name, "asked for": asked_for, "merged": float(np.linalg.norm(change))})
sizes = pd.DataFrame(rows).set_index("layer")
sizes.assign(share=sizes["merged"] / sizes["asked for"]).describe().loc[["min", "50%", "max"]].round(3)

# %% [markdown]
# ## Check it, and pass it on
#
# `verify` hashes inputs and outputs, and without `--quick` merges again and compares. `push` uploads the folder with a
# model card that says how it was made; `--dry-run` only lists what would go. From here on it is a model as any other:
# `AutoModel.from_pretrained(folder)`.

# %%
checked = nufilt("verify", OUT / "merged", "--quick")
pushed = nufilt("push", OUT / "merged", "USER/NAME", "--dry-run")
print("as it was recorded:", checked["holds"])
print(f"would be uploaded: {len(pushed['files'])} files, {pushed['bytes'] / 1e6:.2f} MB")
