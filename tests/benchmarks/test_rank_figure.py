"""The picture of Fig. 4, judged by what stands in it."""

import numpy as np
from drawn_figures import drawn

from benchmarks.study.rank_figure import rank_figure


def test_every_rank_has_its_column():
    curves = {
        "r_p (r_l = r_v = 0)": ((0, 16, 32), (0.5, 0.75, 0.7), (-0.3, -0.1, 0.0)),
        "r_l (r_p = 128)": ((0, 8), (0.5, 0.6), (-0.2, -0.1)),
    }
    figure = drawn(rank_figure(curves, title="study"))
    assert figure.axes[0].get_ylabel() == "ACC, %" and figure.axes[2].get_ylabel() == "BWT, points"
    for column, (label, (ranks, acc, bwt)) in enumerate(curves.items()):
        above, below = figure.axes[column], figure.axes[column + 2]
        np.testing.assert_allclose(above.lines[0].get_ydata(), 100 * np.array(acc))
        np.testing.assert_allclose(below.lines[0].get_ydata(), 100 * np.array(bwt))
        assert [tick.get_text() for tick in below.get_xticklabels()] == [str(rank) for rank in ranks]
        assert below.get_xlabel() == label
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
