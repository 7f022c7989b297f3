"""What is worked on, of models whose numbers can be read."""

from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from nufilt_jax.anatomy import shape_in
from nufilt_jax.checkpoints import Checkpoint, fit, quantised_problems
from nufilt_jax.checkpoints.dtypes import numpy_dtype
from nufilt_jax.config import MethodConfig, OtherParams, option
from nufilt_jax.errors import CheckpointError, Problem, error_of, gathering, of_kind, raise_all
from nufilt_jax.methods import find
from nufilt_jax.methods.selection import Scope, Selection, published_layers, reach_of, select, wanted_by
from nufilt_jax.output.recipe import Settings


def select_readable(
    base: Checkpoint,
    others: Sequence[Checkpoint],
    *,
    layers: str | None,
    other_params: OtherParams = "pretrained",
    scope: Scope = published_layers,
    conv: bool = False,
) -> Selection:
    """Selects from a base, as `select` does, if none of the models has quantised weights there.

    Raises:
      NufiltError: nothing is selected, or weights are quantised in the base or in another model.
    """
    tensors = {
        name: jax.ShapeDtypeStruct(info.shape, numpy_dtype(info.dtype) or np.dtype(np.uint8))
        for name, info in base.tensors.items()
    }
    wanted, in_reach = wanted_by(tensors, layers=layers, scope=scope, conv=conv), reach_of(tensors, layers)
    failure: list[Problem] = []
    selection = Selection((), ())
    with gathering(failure):
        selection = select(tensors, layers=layers, other_params=other_params, scope=scope, conv=conv)

    def would_touch(name: str, shape: tuple[int, ...]) -> bool:
        return in_reach(name) and (other_params != "pretrained" or wanted(name, shape))

    quantised = [p for model in (base, *others) for p in quantised_problems(model, would_touch, selection.touched)]
    raise_all(CheckpointError, quantised)
    if failure:
        raise error_of(failure)
    return selection


def selected(base: Checkpoint, tasks: Iterable[Checkpoint], settings: Settings) -> Selection:
    """What a merge with these settings works on; raises as `select_readable` does."""
    return select_readable(
        base,
        tuple(tasks),
        layers=settings.layers,
        other_params=settings.other_params,
        scope=find(settings.method).scope,
        conv=settings.conv,
    )


def fitted(
    base: Checkpoint,
    tasks: Mapping[str, Checkpoint],
    selection: Selection,
    settings: Settings,
    problems: list[Problem],
    *,
    strict: bool,
) -> tuple[dict[str, Checkpoint], tuple[str, ...]]:
    """The tasks as they fit the base, and what their users should know; what is refused goes to `problems`."""
    fitting, notices = dict[str, Checkpoint](), tuple[str, ...]()
    for name, task in tasks.items():
        found = fit(base, task, selection.touched, asked_for=settings.layers is not None, strict=strict)
        fitting[name] = found.task
        problems += of_kind(CheckpointError, found.problems)
        notices += (*task.notices, *found.notices)
    return fitting, (*notices, *_width_warnings(selection, base, settings.config))


def _width_warnings(selection: Selection, base: Checkpoint, config: MethodConfig) -> list[str]:
    rank = getattr(config, "filter_rank", 0)
    narrow: dict[int, list[str]] = {}
    for name in selection.layers:
        shape = shape_in(base.tensors, name)
        if len(shape) == 2 and shape[1] <= rank:
            narrow.setdefault(shape[1], []).append(name)
    return [
        f"{option('filter_rank')}: {rank} directions are all that layers with {width} inputs have, and "
        f"the filter will remove every direction that the merged model uses: {', '.join(names[:3])}"
        + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for width, names in sorted(narrow.items())
    ]
