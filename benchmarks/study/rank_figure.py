"""The picture of Fig. 4: ACC and BWT against each rank of NUFILT."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nufilt_jax.analysis.figures import line_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def rank_figure(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[float]]], *, title: str
) -> "Figure":
    """ACC and BWT against each of the ranks (Fig. 4).

    Args:
      curves: by the rank that is varied, with what is held: ranks, ACC and BWT in [-1, 1].
      title: above the picture.
    """
    figure = new_figure(1.2 + 3.2 * len(curves), 5.4)
    grid = figure.subplots(2, len(curves), sharey="row", squeeze=False)
    for column, (varied, (ranks, *scores)) in enumerate(curves.items()):
        for row, score in enumerate(scores):
            axes = grid[row, column]
            axes.plot(range(len(ranks)), 100 * np.array(score), linewidth=2, **line_style(row))
            axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
            axes.grid(alpha=0.3)
        grid[1, column].set_xlabel(varied)
    grid[0, 0].set_ylabel("ACC, %")
    grid[1, 0].set_ylabel("BWT, points")
    figure.suptitle(title)
    return figure
