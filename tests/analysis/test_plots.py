"""Pictures, judged by what stands in the figure: labels, numbers and lines, none of them cut off."""

import struct
import sys

import analysis_builders as build
import numpy as np
import pytest
from drawn_figures import drawn
from matplotlib.text import Text

from nufilt_jax.analysis import figures, pictures, plots
from nufilt_jax.analysis.affinity import summarise
from nufilt_jax.analysis.document import as_array
from nufilt_jax.analysis.layers import LAYER_GROUPS
from nufilt_jax.analysis.losses import StepLosses
from nufilt_jax.errors import MissingExtraError

TASKS = ("sun397", "stanford-cars", "oxford_flowers102")
HOSTILE = ("$\\frac{1}", "a\nb\x1b[31m", "<script>", "数据", "x" * 200, "")


def texts(part):
    return [text.get_text() for text in part.findobj(Text) if text.get_visible() and text.get_text()]


def cells(axes):
    """The numbers of a heat map, by (row, column)."""
    return {(round(text.get_position()[1]), round(text.get_position()[0])): text for text in axes.texts}


def test_accuracy_matrix():
    accuracies = np.array([[0.9, 0.8, np.nan], [0.25, 0.7, 0.6], [0.2, 0.3, 0.95]])
    axes, bar = drawn(plots.accuracy_figure(accuracies, TASKS, title="sum: accuracy")).axes
    found = cells(axes)
    assert {place: text.get_text() for place, text in found.items()} == {
        (i, t): f"{100 * accuracies[i, t]:.0f}" for i in range(3) for t in range(3) if (i, t) != (0, 2)
    }
    assert {place for place, text in found.items() if text.get_fontweight() == "bold"} == {
        (0, 0), (0, 1), (1, 1), (1, 2), (2, 2),
    }  # fmt: skip
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"{t}. {task}" for t, task in enumerate(TASKS, 1)]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(TASKS)
    assert axes.get_title() == "sum: accuracy" and "%" in bar.get_ylabel()


def luminance(colour):
    linear = np.where(np.array(colour[:3]) <= 0.04045, np.array(colour[:3]) / 12.92, 0)
    linear = np.where(linear > 0, linear, ((np.array(colour[:3]) + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_numbers_can_be_read_on_every_colour():
    """WCAG's contrast of text and ground; 4.5 is asked for of small text."""
    values = np.linspace(0, 1, 49).reshape(7, 7)
    axes = figures.new_figure(5, 5).add_subplot()
    image = figures.draw_cells(axes, values, text="{:.2f}", highest=1)
    for (row, column), text in cells(axes).items():
        ground = luminance(image.to_rgba(values[row, column]))
        ink = {"black": 0.0, "white": 1.0}[text.get_color()]
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) > 4.5


@pytest.mark.parametrize("n_tasks", [2, 8])
def test_affinities(n_tasks):
    tasks = [f"task-{i}" for i in range(n_tasks)]
    measured = build.random_measured(n_tasks)
    figure = drawn(plots.affinity_figure(measured.affinities, tasks, group="attention", random=0.25))
    mean, high, bar = figure.axes
    for axes, wanted in ((mean, summarise(measured.affinities).mean), (high, summarise(measured.affinities).high)):
        assert {place: text.get_text() for place, text in cells(axes).items()} == {
            place: f"{value:.2f}" for place, value in np.ndenumerate(wanted)
        }
        assert axes.get_xlabel() == "vector of task"
    assert (mean.get_ylabel(), mean.get_title()) == ("data of task", "mean over layers")
    assert high.get_title() == "90th percentile over layers"
    assert "attention" in figure.get_suptitle() and "0.25" in figure.get_suptitle()
    assert bar.get_ylabel() == "affinity, 0 to 1"
    assert mean.images[0].get_clim() == high.images[0].get_clim()  # one scale, or they could not be compared


def test_distributions():
    measured = build.random_measured(3)
    figure = drawn(plots.affinity_curves(measured.affinities, measured.layers, random=0.25))
    assert [axes.get_title() for axes in figure.axes] == list(LAYER_GROUPS)
    for axes, n_layers in zip(figure.axes, (12, 8, 4), strict=True):
        own, other, level = axes.lines
        assert [line.get_label() for line in axes.lines] == ["own task", "other tasks", "random subspaces"]
        assert len(own.get_xdata()) == 3 * n_layers + 1 and len(other.get_xdata()) == 6 * n_layers + 1
        assert own.get_ydata()[-1] == other.get_ydata()[-1] == 1
        assert set(level.get_xdata()) == {0.25}
        assert own.get_linestyle() != other.get_linestyle()
    assert {"own task", "other tasks", "random subspaces"} <= set(texts(figure.legends[0]))


def test_losses():
    rows = {name: StepLosses(*np.random.default_rng(i).uniform(size=(3, 3))) for i, name in enumerate(("a", "b", "c"))}
    figure = drawn(plots.loss_figure(rows, TASKS, unit="share"))
    assert [axes.get_title() for axes in figure.axes] == ["stability loss", "plasticity loss", "harmonic mean"]
    for axes, quantity in zip(figure.axes, StepLosses._fields, strict=True):
        for line, (name, row) in zip(axes.lines, rows.items(), strict=True):
            assert line.get_label() == name
            np.testing.assert_array_equal(line.get_ydata(), getattr(row, quantity))
            np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
    assert figure.axes[0].get_ylabel() == "loss, share"
    assert set(rows) <= set(texts(figure.legends[0]))


def test_lines_differ_in_more_than_colour():
    styles = [tuple(sorted(figures.line_style(i).items())) for i in range(21)]
    assert len(set(styles)) == 21
    in_grey = [(style["marker"], style["linestyle"]) for style in map(figures.line_style, range(21))]
    assert len(set(in_grey)) == 21


def test_forecast_by_block():
    rng = np.random.default_rng(0)
    layers = build.layer_names(11)[::-1]  # blocks 10 and 2 out of order
    values = {name: rng.uniform(size=(3, len(layers))) for name in ("removed_share", "drift")}
    values |= {"restored_share": np.full((3, len(layers)), np.nan)}
    for shares in values.values():
        shares[0] = np.nan
    figure = drawn(plots.forecast_figure(values, layers, TASKS))
    panels = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title().split(",")[0] for axes in panels] == ["removed by the filter", "drift on kept directions"]
    assert [tick.get_text() for tick in panels[-1].get_xticklabels()][:7] == ["q", "k", "v", "out", "fc1", "fc2", "q"]
    assert [tick.get_text() for tick in panels[0].get_yticklabels()] == list(TASKS[1:])
    assert [text for text in texts(figure) if text.startswith("block")] == [f"block {i}" for i in range(11)]
    first = panels[0].images[0].get_array()
    assert first[0, 0] == values["removed_share"][1, layers.index(build.BLOCK.format(0, "self_attn.q_proj"))]


@pytest.mark.parametrize("n_tasks", [1, 3])
def test_all_pictures_of_a_document(n_tasks):
    document = build.random_document(list(TASKS[:n_tasks]), methods=("nufilt", "sum"))
    found = pictures.draw_pictures(document)
    names = {"accuracy", "losses", "affinity_curves", *(pictures.affinity_picture(group) for group in LAYER_GROUPS)}
    assert found.keys() == names | ({"forecast"} if n_tasks > 1 else set())
    for png in found.values():
        width, height = struct.unpack(">II", png[16:24])
        assert png.startswith(b"\x89PNG") and width > 500 and height > 250 and len(png) > 10_000


def test_pictures_show_the_numbers_of_the_document():
    document = build.random_document(list(TASKS))
    shown = dict(pictures._figures(document))
    numbers = {text for text in texts(shown["accuracy"]) if text.isdigit()}
    assert {f"{100 * x:.0f}" for x in as_array(document["accuracy"]["matrix"]).ravel()} <= numbers
    wanted = as_array(document["losses"]["methods"]["nufilt"]["relative"]["whole model"]["stability"])
    np.testing.assert_array_equal(shown["losses"].axes[0].lines[0].get_ydata(), wanted)
    attention = np.array(document["affinity"]["groups"]["attention"]["mean"])
    assert {f"{x:.2f}" for x in attention.ravel()} <= set(texts(shown["affinity_attention"].axes[0]))


def test_parts_that_are_not_known_are_not_drawn():
    assert pictures.draw_pictures(build.empty_document(["a", "b"])) == {}


def test_any_name_can_be_drawn():
    names = [*HOSTILE]
    for _, figure in pictures._figures(build.random_document(names)):
        assert len(figures.as_png(figure)) > 10_000
    assert figures.label("x" * 200) == "x" * 23 + "…"
    assert figures.label("a\nb\x1b[31m") == "a b [31m"


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"drawing needs matplotlib.*pip install 'nufilt_jax\[plots\]'"):
        figures.new_figure(1, 1)
