"""Two outputs of one recipe compared, tensor by tensor: bit for bit, or within what another machine may change."""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nufilt_jax.anatomy import tensor_of
from nufilt_jax.checkpoints import Checkpoint, open_checkpoint, read_added
from nufilt_jax.checkpoints.dtypes import FLOATS
from nufilt_jax.checkpoints.folders import PEFT
from nufilt_jax.checkpoints.peft.adapted import factor_arrays
from nufilt_jax.checkpoints.peft.reader import adapted
from nufilt_jax.checkpoints.tensors import TensorInfo, stream_bytes
from nufilt_jax.errors import Problem
from nufilt_jax.methods.stacked import whole
from nufilt_jax.output.documents import read_forecast
from nufilt_jax.output.place import FORECAST, RECIPE, STATE
from nufilt_jax.output.recipe import Step
from nufilt_jax.output.state import stored_windows
from nufilt_jax.output.stored import Stored

# Per task, and of the norm of the update. Measured between devices at 1.3e-5, and between 1 and 2 cores at 1e-6; where
# singular values at a cut are nearly equal, which of their directions is taken is chance.
TOLERANCE = 2e-5
TOLERANCE_AT_NEAR_EQUAL_CUTS = 1e-3

_ORDER = 1e-9  # of a step's largest loss: windows add their layers' losses in another order
_AGAIN = "merge again, or restore the output"
_ELEMENTS = 1 << 20  # compared at once


def tolerance_entry() -> dict[str, float]:
    """By how much the same merge may differ elsewhere: per task, as shares of a tensor's update."""
    return {"update": TOLERANCE, "near_equal_cuts": TOLERANCE_AT_NEAR_EQUAL_CUTS}


@dataclasses.dataclass
class Comparison:
    """What came of comparing.

    Attributes:
      tensors: how many were compared, those of the state included.
      identical: how many of these are the same in every bit.
      worst: the largest difference of a tensor, as a share of the norm of its update; infinite where there is no
        update, or a number is not finite.
      worst_tensor: which; empty if all are identical.
      problems: the tensors that are too far from each other, or in one output alone.
    """

    tensors: int = 0
    identical: int = 0
    worst: float = 0.0
    worst_tensor: str = ""
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Without the problems; JSON has no infinite number, and `worst` is null then."""
        told = dataclasses.asdict(self) | {"worst": self.worst if math.isfinite(self.worst) else None}
        del told["problems"]
        return told | {"tolerance": tolerance_entry()}


def compare(
    folder: Path, again: Path, base: Checkpoint, n_tasks: int, phase: Callable[[str], None], *, is_exact: bool
) -> Comparison:
    """Compares the weights, the added parameters and the state of two output folders; no state if the first has none.

    Args:
      folder: the output to be verified.
      again: what its recipe gives now.
      base: of both.
      n_tasks: that were merged.
      phase: is told what is compared.
      is_exact: whether bits must be the same.

    Raises:
      NufiltError: one of the two cannot be read.
    """
    near = _near_equal(folder)

    def tolerance(name: str) -> float:
        if is_exact:
            return 0.0
        return n_tasks * (TOLERANCE_AT_NEAR_EQUAL_CUTS if tensor_of(name) in near else TOLERANCE)

    found = Comparison()
    phase("comparing the models")
    _compare_models(found, folder, again, base, tolerance, is_exact=is_exact)
    where = str(folder)
    _compare_arrays(found, where, "added", read_added(folder), read_added(again), tolerance)
    if not has_state(folder):
        return found
    phase("comparing the states")
    with Stored(stored_windows(folder / STATE)) as old, Stored(stored_windows(again / STATE)) as new:
        if set(old.layers) != set(new.layers):
            what = "holds other layers than the recipe selects"
            found.problems.append(Problem(str(folder / STATE), what, _AGAIN))
            return found
        for layer in old.layers:
            ours, theirs = ({layer: whole(stored.deltas([layer])[layer])} for stored in (old, new))
            _compare_arrays(found, where, "state", ours, theirs, tolerance)
        ours, theirs = old.others(old.layers), new.others(new.layers)
        for group in sorted({*ours, *theirs} - {"numbers"}):  # which merges in one window have no need of
            _compare_arrays(found, where, f"state: {group}", ours.get(group, {}), theirs.get(group, {}), tolerance)
    return found


def loss_problems(folder: Path, then: Sequence[Step], now: Sequence[Step], *, is_exact: bool) -> Iterator[Problem]:
    """The steps whose losses are not those of merging again.

    Args:
      folder: the output to be verified.
      then: the steps that its recipe tells of.
      now: those of merging again.
      is_exact: whether the layers' losses must be the same in every bit.
    """
    # Which layers have near-equal cuts, a sum over all of them does not tell.
    tolerance = _ORDER if is_exact else len(then) * TOLERANCE_AT_NEAR_EQUAL_CUTS
    for old, new in zip(then, now, strict=True):
        most = tolerance * max((abs(loss) for loss in new.losses if loss is not None), default=0.0)
        for number, (mine, theirs) in enumerate(itertools.zip_longest(old.losses, new.losses), 1):
            is_near = mine is not None and theirs is not None and abs(mine - theirs) <= most
            if mine != theirs and not is_near:
                what = f"loss {number} of {old.task} is not what the recipe gives: it is {mine}, and should be {theirs}"
                yield Problem(str(folder / RECIPE), what, _AGAIN)
                break  # where one was changed all may have been


def has_state(folder: Path) -> bool:
    """Whether anything stands where the state of a merge does: of a pushed one it is left out."""
    return os.path.lexists(folder / STATE)


def _near_equal(folder: Path) -> set[str]:
    """The tensors of which the forecast says that a cut lies among nearly equal singular values, at any step."""
    path = folder / FORECAST
    steps = read_forecast(path) if path.is_file() else []
    return {tensor_of(layer) for step in steps for layer in step["near_equal_cuts"]}


def _compare_models(
    found: Comparison, folder: Path, again: Path, base: Checkpoint, tolerance: Callable[[str], float], *, is_exact: bool
) -> None:
    old, new = (open_checkpoint(str(path), adapters=True) for path in (folder, again))
    for name in sorted(old.tensors.keys() ^ new.tensors.keys()):  # a set has no order that lasts
        only = "is there" if name in old.tensors else "is missing"
        found.problems.append(Problem(str(folder), f"{only}, and is not what the recipe gives", _AGAIN, name))
    judged = frozenset() if is_exact or old.format != PEFT else _compare_products(found, old, new, base, tolerance)
    for name, info in old.tensors.items():
        if (other := new.tensors.get(name)) is None or name in judged:
            continue
        found.tensors += 1
        if (info.dtype, info.shape) != (other.dtype, other.shape):
            what = f"is {info.dtype} of shape {list(info.shape)}, and the recipe gives {other.dtype} of shape"
            found.problems.append(Problem(str(info.file), f"{what} {list(other.shape)}", _AGAIN, info.stored_name))
        elif all(_same_bytes(a, b) for a, b in zip(info.copies, other.copies, strict=False)):
            found.identical += 1
        elif info.dtype in FLOATS:
            start = base.read([name])[name] if name in base.tensors else None  # a factor is an update itself
            pair = old.read([name])[name], new.read([name])[name]
            _judge(found, str(info.file), info.stored_name, *pair, start, tolerance(name))
        else:
            found.problems.append(Problem(str(info.file), "is not what the recipe gives", _AGAIN, info.stored_name))


def _compare_products(
    found: Comparison, old: Checkpoint, new: Checkpoint, base: Checkpoint, tolerance: Callable[[str], float]
) -> frozenset[str]:
    """Holds B A of two adapters against each other; gives the names of the factors that this is said of.

    On another machine the factors of a truncated product may have other signs, or be turned among near equals.
    """
    ours, theirs = (adapted(base, one).factors for one in (old, new))
    judged = set[str]()
    for name in ours.keys() & theirs.keys():
        (b, a), (b_new, a_new) = (factor_arrays(factors[name]) for factors in (ours, theirs))
        judged |= {ours[name].a.stored_name, ours[name].b.stored_name}
        found.tensors += 2
        if (b.shape, a.shape) == (b_new.shape, a_new.shape) and np.array_equal(b, b_new) and np.array_equal(a, a_new):
            found.identical += 2
        else:
            _judge(found, str(ours[name].a.file), name, b @ a, b_new @ a_new, None, tolerance(name))
    return frozenset(judged)


def _same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    if a.nbytes != b.nbytes or a.stored_shape != b.stored_shape:
        return False
    # Chunks of both come in the same sizes, unless Flax has split one of them: then the numbers are compared.
    return all(mine == theirs for mine, theirs in zip(stream_bytes(a), stream_bytes(b), strict=False))


def _compare_arrays(
    found: Comparison,
    where: str,
    what: str,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    tolerance: Callable[[str], float],
) -> None:
    for name in sorted({*old, *new}):
        found.tensors += 1
        if name not in old or name not in new or old[name].shape != new[name].shape:
            problem = Problem(where, f"the {what} is not what the recipe gives", _AGAIN, name)
            found.problems.append(problem)
        elif old[name].tobytes() == new[name].tobytes():
            found.identical += 1
        else:
            _judge(found, f"{where}: {what}", name, old[name], new[name], None, tolerance(name))


def _judge(found: Comparison, where: str, name: str, old: Any, new: Any, start: Any | None, tolerance: float) -> None:
    """Takes in two tensors that differ.

    Args:
      found: gets the verdict.
      where: their file, for messages.
      name: of the tensor, as it is called there.
      old: as it stands.
      new: as the recipe gives it now.
      start: θ0 of both; None if they are updates themselves.
      tolerance: of the norm of the update; rounding to the type stored comes on top where a model is compared.
    """
    squares = np.zeros(3)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told of below
        for mine, theirs, origin in _rows(old, new, start):
            squares += [np.square(x).sum() for x in (mine - theirs, theirs - origin, theirs)]
    difference, update, size = np.sqrt(squares)
    is_share = update and np.isfinite(squares).all()
    share = float(difference / update) if is_share else math.inf
    if difference == 0:  # of -0.0 and 0.0 the bits alone differ
        share = 0.0
    rounding = 0.0 if start is None or not tolerance else float(ml_dtypes.finfo(old.dtype).eps) * size
    if share > found.worst:
        found.worst, found.worst_tensor = share, name
    # So put, what is no number is a problem.
    if not tolerance or not difference <= tolerance * update + rounding:
        what = "is not what the recipe gives"
        if difference == 0:
            what += ": the sign of a zero differs"
        elif math.isfinite(share):
            what += f": it differs by {share:.2g} of its update, where {tolerance:.2g} is allowed"
        found.problems.append(Problem(where, what, _AGAIN, name))


def _rows(old: Any, new: Any, start: Any | None) -> Iterator[tuple[Any, Any, Any]]:
    """Some rows at a time, in float64."""
    parts = [np.atleast_1d(x) for x in (old, new)]
    origin = np.zeros((len(parts[0]), *[1] * (parts[0].ndim - 1))) if start is None else np.atleast_1d(start)
    n_rows = max(1, _ELEMENTS * len(parts[0]) // max(1, parts[0].size))
    for at in range(0, len(parts[0]), n_rows):
        mine, theirs, begun = (np.asarray(part[at : at + n_rows], np.float64) for part in (*parts, origin))
        yield mine, theirs, begun
