"""Pictures that a person can read: labelled, with units, in colours that everyone can tell apart.

Every function takes numbers and returns a figure; `figures.as_png` turns it into a file. All raise `MissingExtraError`
where matplotlib is not installed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from nufilt_jax.analysis.affinity import PERCENTILE, own_and_cross, summarise
from nufilt_jax.analysis.figures import COLOURS, as_png, draw_cells, line_style, name_columns, name_rows, new_figure
from nufilt_jax.analysis.forecast import QUANTITIES
from nufilt_jax.analysis.layers import LAYER_GROUPS, by_block, in_group, short
from nufilt_jax.analysis.losses import StepLosses
from nufilt_jax.durable import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_accuracy_matrix(
    accuracies: Float[np.ndarray, "n_tasks n_tasks"], tasks: Sequence[str], path: Path, *, title: str
) -> None:
    """Writes `accuracy_figure` into a PNG file."""
    atomic_write(path, as_png(accuracy_figure(accuracies, tasks, title=title)))


def accuracy_figure(accuracies: Float[np.ndarray, "n_tasks n_tasks"], tasks: Sequence[str], *, title: str) -> "Figure":
    """Accuracy on every task (rows) after every step (columns).

    Args:
      accuracies: a[i, t] in [0, 1] on task i after step t; NaN where it was not measured.
      tasks: names in the order merged.
      title: above the picture.
    """
    n = len(tasks)
    figure = new_figure(max(5.5, 2.6 + 0.8 * n), 2.0 + 0.5 * n)
    axes = figure.add_subplot()
    seen = np.triu(np.ones((n, n), bool))
    image = draw_cells(axes, 100 * accuracies, text="{:.0f}", highest=100, bold=seen)
    name_columns(axes, _steps(tasks))
    name_rows(axes, tasks)
    axes.set_xlabel("task merged at the step (bold: merged by then)")
    axes.set_ylabel("evaluated on")
    axes.set_title(title)
    figure.colorbar(image, label="test accuracy, %")
    return figure


def affinity_figure(
    values: Float[np.ndarray, "tasks tasks layers"], tasks: Sequence[str], *, group: str, random: float
) -> "Figure":
    """Heat maps of the affinity between data and task vectors: mean and 90th percentile over layers (Figs. 2, 6, 7).

    Args:
      values: of task i's data with task j's vector, for the layers of the group.
      tasks: names.
      group: of the layers, for the title.
      random: the level of random subspaces.
    """
    n = len(tasks)
    figure = new_figure(2.2 + 2 * max(2.4, 1.3 + 0.62 * n), 2.2 + 0.45 * n)
    found = summarise(values)
    highest = max(float(np.nanmax(found.high)), random)  # one scale: the two maps share a colour bar
    image = None
    for place, (name, cells) in enumerate((("mean", found.mean), (f"{PERCENTILE}th percentile", found.high)), 1):
        axes = figure.add_subplot(1, 2, place)
        image = draw_cells(axes, cells, text="{:.2f}", highest=highest)
        name_columns(axes, tasks)
        name_rows(axes, tasks if place == 1 else [""] * n)
        axes.set_xlabel("vector of task")
        axes.set_title(f"{name} over layers")
    figure.axes[0].set_ylabel("data of task")
    figure.suptitle(f"Subspace affinity, {group} (random subspaces: {random:.2f})")
    if image is not None:
        figure.colorbar(image, ax=figure.axes, label="affinity, 0 to 1")
    return figure


def affinity_curves(
    values: Float[np.ndarray, "tasks tasks layers"], layers: Sequence[str], *, random: float
) -> "Figure":
    """Distribution over layers of own-task and cross-task affinities, for every group of layers (Fig. 8)."""
    figure = new_figure(10.5, 3.9)
    for place, group in enumerate(LAYER_GROUPS, 1):
        axes = figure.add_subplot(1, len(LAYER_GROUPS), place)
        own, cross = own_and_cross(values[:, :, in_group(layers, group)])
        for label, sample, colour, dashes in (("own task", own, 0, "-"), ("other tasks", cross, 1, "--")):
            if len(sample):
                axes.ecdf(sample, label=label, color=COLOURS[colour], linestyle=dashes, linewidth=2)
        axes.axvline(random, color="black", linestyle=":", label="random subspaces")
        axes.set_xlim(0, 1)
        axes.set_title(group)
        axes.set_xlabel("affinity of data with task vector")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of layers and tasks")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def loss_figure(losses: Mapping[str, StepLosses], tasks: Sequence[str], *, unit: str) -> "Figure":
    """Stability, plasticity and their harmonic mean after every step (Fig. 5).

    Args:
      losses: by method.
      tasks: names in the order merged.
      unit: of the losses.
    """
    figure = new_figure(11.5, 4.4)
    steps = range(1, len(tasks) + 1)
    for place, quantity in enumerate(StepLosses._fields, 1):
        axes = figure.add_subplot(1, 3, place)
        for index, (method, rows) in enumerate(losses.items()):
            axes.plot(steps, getattr(rows, quantity), label=method, markersize=5, **line_style(index))
        axes.set_title({"harmonic": "harmonic mean"}.get(quantity, f"{quantity} loss"))
        axes.set_xlim(0.7, len(tasks) + 0.3)
        axes.set_ylim(bottom=0)
        name_columns(axes, _steps(tasks), first=1)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"loss, {unit}")
    figure.supxlabel("task merged at the step; losses are means over layers, less is better", fontsize="medium")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(losses), 6))
    return figure


def forecast_figure(
    values: Mapping[str, Float[np.ndarray, "steps layers"]], layers: Sequence[str], tasks: Sequence[str]
) -> "Figure":
    """The data-free forecast of every step and layer, layers grouped by block.

    Args:
      values: by quantity, of `forecast.QUANTITIES`; one that is NaN everywhere is left out.
      layers: names, in the order of the columns.
      tasks: names in the order merged; steps of which nothing is forecast are left out.
    """
    known = [step for step in range(len(tasks)) if any(not np.isnan(cells[step]).all() for cells in values.values())]
    shown = {name: cells[known] for name, cells in values.items() if not np.isnan(cells).all()}
    tasks = [tasks[step] for step in known]
    blocks = by_block(layers)
    order = [layers.index(name) for _, members in blocks for name in members]
    edges = np.cumsum([0, *(len(members) for _, members in blocks)]) - 0.5
    figure = new_figure(max(6.5, 2.6 + 0.24 * len(layers)), 1.2 + len(shown) * (0.75 + 0.26 * len(tasks)))
    for place, (quantity, cells) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(len(shown), 1, place)
        image = axes.imshow(cells[:, order], cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
        axes.set_title(QUANTITIES[quantity], fontsize="medium")
        name_rows(axes, tasks)
        axes.set_xticks([])
        axes.vlines(edges[1:-1], -0.5, len(tasks) - 0.5, color="white", linewidth=2)
        figure.colorbar(image, ax=axes)
    first, last = figure.axes[0], figure.axes[2 * (len(shown) - 1)]  # every second one is a colour bar
    last.set_xticks(range(len(layers)), [short(layers[i]) for i in order], rotation=90, fontsize="small")
    above = first.secondary_xaxis("top")
    above.set_xticks((edges[:-1] + edges[1:]) / 2, [f"block {title}" for title, _ in blocks])
    above.tick_params(length=0)
    return figure


def _steps(tasks: Sequence[str]) -> list[str]:
    return [f"{step}. {task}" for step, task in enumerate(tasks, 1)]
