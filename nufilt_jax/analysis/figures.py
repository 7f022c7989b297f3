"""What all pictures share: a figure without a window, colours that everyone can tell apart, heat maps with numbers."""

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from nufilt_jax.errors import MissingExtraError, Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Okabe and Ito's palette, without its yellow, which is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLOUR_MAP = "cividis"
_DPI = 120
_LONGEST = 24  # letters of a name


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, which a canvas without a window draws.

    Raises:
      MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        fix = "pip install 'nufilt_jax[plots]'"
        what = "drawing needs matplotlib, which is not installed"
        raise MissingExtraError(Problem("pictures", what, fix)) from error
    # Not by pyplot, which picks a backend for the whole process and keeps every figure.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_png(figure: "Figure") -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for it
        figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def label(text: str) -> str:
    """A name as it may stand in a picture: in one line, and not too long for it.

    >>> label("a name that is far too long for a picture")
    'a name that is far too …'
    """
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def line_style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line number `index`: told apart without colour too."""
    turn, colour = divmod(index, len(COLOURS))
    marker = MARKERS[(colour + turn) % len(MARKERS)]
    return {"color": COLOURS[colour], "marker": marker, "linestyle": ("-", "--", ":")[turn % 3]}


def draw_cells(
    axes: "Axes",
    values: Float[np.ndarray, "rows columns"],
    *,
    text: str,
    highest: float,
    lowest: float = 0.0,
    bold: np.ndarray | None = None,
) -> "AxesImage":
    """A heat map with the number in every cell; cells without one stay empty.

    Args:
      axes: where.
      values: NaN for an empty cell.
      text: format of the numbers, as "{:.2f}".
      highest: value of the brightest colour.
      lowest: of the darkest.
      bold: which numbers stand out; None for all alike.
    """
    image = axes.imshow(values, cmap=COLOUR_MAP, vmin=lowest, vmax=highest, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        stands_out = bold is None or bold[row, column]
        axes.text(
            column,
            row,
            text.format(value),
            ha="center",
            va="center",
            color=_readable_on(tuple(image.to_rgba(value))),
            fontweight="bold" if bold is not None and stands_out else "normal",
            alpha=1.0 if stands_out else 0.85,
        )
    return image


def _readable_on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever contrasts more: WCAG 2's relative luminance."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"  # 0.179: (L + 0.05)² = 1.05 · 0.05, where both contrast alike


def name_rows(axes: "Axes", names: Sequence[str]) -> None:
    """Names along the y axis, from place 0 on."""
    # No mathematics: a `$` in a name is a letter.
    axes.set_yticks(range(len(names)), [label(name) for name in names], parse_math=False)


def name_columns(axes: "Axes", names: Sequence[str], *, first: int = 0) -> None:
    """Names along the x axis, slanted, from place `first` on."""
    places = range(first, first + len(names))
    slanted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(places, [label(name) for name in names], parse_math=False, **slanted)
