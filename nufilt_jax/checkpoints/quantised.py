"""Weights whose numbers mean something only together with others: quantised and packed ones."""

import re
from collections.abc import Callable, Collection, Iterator

from nufilt_jax.checkpoints.dtypes import FLOATS, INTEGERS
from nufilt_jax.checkpoints.reader import Checkpoint
from nufilt_jax.checkpoints.tensors import TensorInfo
from nufilt_jax.errors import Problem
from nufilt_jax.patterns import patterns

# What quantisers call the integers that stand for a weight; other integers are buffers.
_STANDS_FOR_WEIGHT = re.compile(r"weight|q?weight_packed|qweight|qzeros|\w+_(?:blocks|scales)|\w*_proj|w\d")
_SCALE = re.compile(r"(?:weight_|input_|output_)?(?:scales?|zeros?|zero_points?)(?:_inv)?|SCB|absmax|quant_map|g_idx")


def is_quantised(info: TensorInfo) -> bool:
    """Whether a tensor is a weight in a type that is not computed with: float8, packed, or integers with scales."""
    if info.dtype in FLOATS or info.dtype == "C64":
        return False
    return info.dtype not in INTEGERS or _STANDS_FOR_WEIGHT.fullmatch(_leaf(info.name)) is not None


def quantised_problems(
    model: Checkpoint, wanted: Callable[[str, tuple[int, ...]], bool], touched: Collection[str]
) -> list[Problem]:
    """The quantised tensors that a merge would touch, or whose scales it would; alike ones together.

    Args:
      model: base or task.
      wanted: whether the merge would touch a tensor of this name and shape, if its type allowed that.
      touched: canonical names of the tensors that it does touch.
    """
    modules = {_module(name) for name in touched if _SCALE.fullmatch(_leaf(name))}
    around = [name for name in touched if _module(name) and not _SCALE.fullmatch(_leaf(name))]
    found = {
        info.name: info
        for info in model.tensors.values()
        if is_quantised(info) and _is_in_reach(info, wanted, modules, around)
    }
    return list(_by_pattern(found))


def _is_in_reach(
    info: TensorInfo, wanted: Callable[[str, tuple[int, ...]], bool], modules: set[str], around: list[str]
) -> bool:
    module = _module(info.name)
    as_weight = f"{module}.weight" if module else "weight"
    # Packed ones have neither the weight's name nor its shape: any shape of a matrix stands for that.
    if wanted(info.name, info.shape) or wanted(as_weight, (2, 2)):
        return True
    return module in modules or any(name.startswith(info.name) for name in around)


def _by_pattern(found: dict[str, TensorInfo]) -> Iterator[Problem]:
    kinds: dict[str, list[str]] = {}
    for name, info in found.items():
        kinds.setdefault(info.dtype, []).append(name)
    for dtype, names in kinds.items():
        for group in patterns(names):
            info, more = found[group.names[0]], len(group.names) - 1
            alike = f", and {more} more like it ({group.pattern})" if more else ""
            what = f"holds {dtype}{alike}: quantised weights cannot be merged"
            fix = "dequantize the model first, or exclude it with --layers"
            yield Problem(str(info.file), what, fix, info.stored_name)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _module(name: str) -> str:
    return name.rpartition(".")[0]
