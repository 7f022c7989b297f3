"""What a merge selects, what it leaves although the tasks moved it, and how much of each task's change that is."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

from nufilt_jax.anatomy import FLAT, family_of, is_buffer, shape_in
from nufilt_jax.checkpoints import Checkpoint
from nufilt_jax.checkpoints.dtypes import FLOATS
from nufilt_jax.engine.plan import Plan
from nufilt_jax.methods import find
from nufilt_jax.methods.selection import Selection, published_layers, reach_of
from nufilt_jax.output.facts import Covered
from nufilt_jax.output.recipe import Settings
from nufilt_jax.patterns import NameGroup, patterns

MOST_OUTSIDE = 0.05  # share of a task's squared change beyond which leaving it out is warned about

SquaredChanges = Mapping[str, Mapping[str, float]]  # by task and tensor, Σ (θ_t − θ0)²


def coverage(plan: Plan, changes: SquaredChanges) -> tuple[tuple[Covered, ...], tuple[Covered, ...]]:
    """What a plan merges, and what it leaves: `selected` and `left` of plan and recipe."""
    before = plan.recorded.recipe.left if plan.recorded else ()
    return _selected(plan.base, plan.merged_layers), _left_rows(plan.base, plan.selection, changes, before)


def outside_share(base: Checkpoint, selection: Selection, moved: Mapping[str, float]) -> float:
    """The share of a task's squared change that lies in tensors that the merge leaves."""
    return _share(_left(base, selection), moved)


def _selected(base: Checkpoint, layers: Iterable[str]) -> tuple[Covered, ...]:
    """The layers that the method merges, by pattern, with counts."""
    rows = []
    for group in patterns(layer.removesuffix(FLAT) for layer in layers):
        shapes = (shape_in(base.tensors, name) for name in group.names)
        rows.append(_row(group, sum(map(math.prod, shapes))))
    return tuple(rows)


def _left_rows(
    base: Checkpoint, selection: Selection, changes: SquaredChanges, before: Iterable[Covered]
) -> tuple[Covered, ...]:
    """The trained tensors that stay as the base has them, by pattern; with `changes`, those alone that a task moved.

    `share` is by task the part of its squared change that is lost there; of tasks that are not at hand as `before`,
    the rows of the recipe so far, has it.
    """
    known = {row.pattern: row.share or {} for row in before}
    rows = []
    for group in patterns(_left(base, selection)):
        shares = dict(known.get(group.pattern, {}))
        shares |= {task: _share(group.names, moved) for task, moved in changes.items() if any(moved.values())}
        if not changes or any(shares.values()):
            row = _row(group, sum(base.tensors[name].size for name in group.names))
            rounded = {task: round(share, 6) for task, share in shares.items()}
            rows.append(dataclasses.replace(row, share=rounded or None))
    return tuple(rows)


def outside_warnings(
    base: Checkpoint, selection: Selection, settings: Settings, changes: SquaredChanges
) -> tuple[str, ...]:
    """A warning for each task of whose squared change more than `MOST_OUTSIDE` is left out.

    What the published choice for CLIP leaves of the vision tower is meant to be left: it is told and not warned about.
    """
    counts = _counts(base, settings)
    left = [name for name in _left(base, selection) if counts(name)]
    warnings = []
    for task, moved in changes.items():
        share = _share(left, moved)
        if share > MOST_OUTSIDE:
            parts = sorted(((_share(group.names, moved), group.pattern) for group in patterns(left)), reverse=True)
            named = ", ".join(f"{pattern} {part:.1%}" for part, pattern in parts[:3])
            warnings.append(
                f"{task}: {share:.1%} of its squared change is outside the selected layers and is left out: {named}"
                " (select more with --layers, or see --other-params)"
            )
    return tuple(warnings)


def coverage_lines(selected: Iterable[Covered], left: Iterable[Covered]) -> list[str]:
    """Both as text: `model.layers.*.self_attn.{q,k,v,o}_proj  4 x 32`."""
    lines = [f"merged  {row.pattern}  {row.kinds} x {row.layers // row.kinds}" for row in selected]
    for row in left:
        shares = (row.share or {}).values()
        lost = f": up to {max(shares):.1%} of a task's squared change" if shares else ""
        lines.append(f"left    {row.pattern}  {row.kinds} x {row.layers // row.kinds}{lost}")
    return lines


def _counts(base: Checkpoint, settings: Settings) -> Callable[[str], bool]:
    is_published = settings.layers is None and find(settings.method).scope is published_layers
    if not (is_published and family_of(base.tensors) == "clip"):
        return lambda name: True
    in_reach = reach_of(base.tensors, None)
    return lambda name: not in_reach(name)


def _share(names: Iterable[str], moved: Mapping[str, float]) -> float:
    """The share of a task's squared change that lies in some tensors; 0 if nothing moved."""
    total = sum(moved.values())
    return sum(moved.get(name, 0.0) for name in names) / total if total > 0 else 0.0


def _left(base: Checkpoint, selection: Selection) -> list[str]:
    touched = set(selection.touched)
    return [
        name
        for name, info in base.tensors.items()
        if name not in touched and info.dtype in FLOATS and info.size and not is_buffer(name, info.shape)
    ]


def _row(group: NameGroup, parameters: int) -> Covered:
    return Covered(pattern=group.pattern, kinds=group.kinds, layers=len(group.names), parameters=parameters)
