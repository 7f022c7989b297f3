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
# # Do task vectors lie where their data lie?
#
# The paper's observation that makes merging without data possible (Qiu et al.,
# [arXiv:2509.21413v2](https://arxiv.org/abs/2509.21413v2), Figs. 2 and 6 to 8): the input directions that a task vector
# acts on are those in which the inputs of its own task are large, so the task vector can stand in for the data.
#
# For every layer, V_d are the leading directions of the inputs that task i's model sees on its own images, and V̂ the
# leading input directions of task j's vector. Their affinity, Eq. (5), is the share of V_d that lies in the span of V̂:
# 1 if all of it does, r / n for random subspaces of r out of n directions.
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
# ## Measure
#
# `MODEL` is all that has to be changed; the paper's checkpoints and images come from the Hugging Face Hub. The
# affinities are of base and fine-tuned models alone, so any merge of them will do: `sum` is the quickest.

# %%
import contextlib
import io
import json
import os

from nufilt_jax.cli import main

MODEL = "tiny"  # or: vit-b32 vit-b16 vit-l14
IMAGES = 16 if os.environ.get("NOTEBOOK_FAST") else 256  # of each task
OUT = Path("merged") / MODEL / "sum"


def nufilt(*arguments):
    """Runs a command and returns the JSON document that it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main([*map(str, arguments), "--json"])
    if status:
        raise RuntimeError("the command was refused: see the lines above")
    return json.loads(printed.getvalue())


nufilt("merge", "--model", MODEL, "--method", "sum", "--out", OUT)
document = nufilt("analyze", OUT, "--images", IMAGES)
if document["affinity"] is None:
    raise RuntimeError(document["missing"]["affinity"])

# %%
from IPython.display import Image

from nufilt_jax.analysis import plots
from nufilt_jax.analysis.document import as_array
from nufilt_jax.analysis.figures import as_png
from nufilt_jax.analysis.layers import in_group

tasks, affinity = document["tasks"], document["affinity"]
values, layers, random = as_array(affinity["values"]), affinity["layers"], affinity["random"]


def heat_maps(group):
    """Affinity of every task's data (rows) with every task's vector (columns)."""
    chosen = values[:, :, in_group(layers, group)]
    return Image(as_png(plots.affinity_figure(chosen, tasks, group=group, random=random)))


for group, found in affinity["groups"].items():
    print(f"{group:12} own task {found['own_mean']:.2f}, other tasks {found['cross_mean']:.2f}, random {random:.2f}")

# %% [markdown]
# ## The whole model
#
# Heat maps as in Figs. 2, 6 and 7: mean and 90th percentile over all linear layers. A bright diagonal says that a
# task's vector acts on its own data more than another task's vector does. On the built-in checkpoints all cells are far
# above the level of random subspaces; the diagonal stands out for some tasks and not for all, since the images of these
# tasks are much alike.

# %%
heat_maps("whole model")

# %% [markdown]
# ## Attention
#
# The same over the projections of queries, keys, values and output alone.

# %%
heat_maps("attention")

# %% [markdown]
# ## MLP
#
# The same over the two feed-forward matrices of each block.

# %%
heat_maps("MLP")

# %% [markdown]
# ## All layers apart
#
# Curves as in Fig. 8: the share of layers and tasks (y) whose affinity is at most x. The further right a curve, the
# higher the affinities; the gap between the curves is what a task's vector knows of its own data rather than of all
# images.

# %%
Image(as_png(plots.affinity_curves(values, layers, random=random)))
