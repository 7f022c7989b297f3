"""All pictures of a merge, from its analysis document alone."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nufilt_jax.analysis import plots
from nufilt_jax.analysis.document import as_array
from nufilt_jax.analysis.figures import as_png
from nufilt_jax.analysis.layers import LAYER_GROUPS, WHOLE_MODEL, in_group
from nufilt_jax.analysis.losses import StepLosses
from nufilt_jax.evaluation.metrics import of_examples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RELATIVE = "share of ‖τ x‖²"


def draw_pictures(document: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files by name, for the parts that the document has.

    Args:
      document: of `document.make_document`.

    Raises:
      MissingExtraError: matplotlib is not installed.
    """
    return {name: as_png(figure) for name, figure in _figures(document)}


def affinity_picture(group: str) -> str:
    """Name of the heat maps of a group of layers.

    >>> affinity_picture("whole model")
    'affinity_whole_model'
    """
    return "affinity_" + group.lower().replace(" ", "_")


def _figures(document: Mapping[str, Any]) -> Iterator[tuple[str, "Figure"]]:
    tasks = document["tasks"]
    if accuracy := document["accuracy"]:
        title = f"{document['method']}: accuracy{of_examples(document['limit'])} after each step"
        yield "accuracy", plots.accuracy_figure(as_array(accuracy["matrix"]), tasks, title=title)
    if forecast := document["forecast"]:
        values = {quantity: as_array(cells) for quantity, cells in forecast["values"].items()}
        yield "forecast", plots.forecast_figure(values, forecast["layers"], tasks)
    if found := document["losses"]:
        rows = {name: method["relative"][WHOLE_MODEL] for name, method in found["methods"].items()}
        losses = {name: StepLosses(**{key: as_array(x) for key, x in row.items()}) for name, row in rows.items()}
        yield "losses", plots.loss_figure(losses, tasks, unit=RELATIVE)
    if affinity := document["affinity"]:
        values, layers, random = as_array(affinity["values"]), affinity["layers"], affinity["random"]
        for group in LAYER_GROUPS:
            chosen = values[:, :, in_group(layers, group)]
            yield affinity_picture(group), plots.affinity_figure(chosen, tasks, group=group, random=random)
        yield "affinity_curves", plots.affinity_curves(values, layers, random=random)
