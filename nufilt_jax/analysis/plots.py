"""Pictures that a person can read: labelled, with units, in colours that everyone can tell apart."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from nufilt_jax.errors import MissingExtraError, Problem


def draw_accuracy_matrix(
    accuracies: Float[np.ndarray, "n_tasks n_tasks"], tasks: Sequence[str], path: Path, *, title: str
) -> None:
    """Draws accuracy on every task (rows) after every step (columns) into a PNG file.

    Args:
      accuracies: a[i, t] in [0, 1] on task i after step t.
      tasks: names in the order merged.
      path: the file to write.
      title: above the picture.

    Raises:
      MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        fix = "pip install 'nufilt_jax[plots]'"
        raise MissingExtraError(Problem(str(path), "drawing needs matplotlib, which is not installed", fix)) from error
    n = len(tasks)
    figure = Figure(figsize=(2.4 + 0.8 * n, 1.6 + 0.6 * n), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(100 * accuracies, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for i in range(n):
        for t in range(n):
            seen = i <= t
            axes.text(
                t,
                i,
                f"{100 * accuracies[i, t]:.0f}",
                ha="center",
                va="center",
                color="black" if accuracies[i, t] > 0.6 else "white",
                fontweight="bold" if seen else "normal",
                alpha=1.0 if seen else 0.6,
            )
    axes.set_xticks(range(n), [f"{t + 1}. {task}" for t, task in enumerate(tasks)], rotation=35, ha="right")
    axes.set_yticks(range(n), tasks)
    axes.set_xlabel("task merged at the step")
    axes.set_ylabel("evaluated on (bold: merged by then)")
    axes.set_title(title)
    figure.colorbar(image, label="test accuracy, %")
    figure.savefig(path, dpi=120)
