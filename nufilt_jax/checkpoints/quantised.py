"""Weights whose numbers mean something only together with others: quantised and packed ones."""

import re
from collections.abc import Callable, Collection, Iterator

from nufilt_jax.anatomy import in_block, is_buffer
from nufilt_jax.checkpoints.dtypes import FLOATS, INTEGERS
from nufilt_jax.checkpoints.reader import Checkpoint
from nufilt_jax.checkpoints.tensors import TensorInfo
from nufilt_jax.errors import Problem
from nufilt_jax.patterns import patterns

# What quantisers call the integers that stand for a weight.
_STANDS_FOR_WEIGHT = re.compile(r"weight|q?weight_packed|qweight|qzeros|\w+_(?:blocks|scales)|\w*_proj|w\d")
_SCALE = re.compile(
    r"(?:weight|input|output)?_?(?:scales?|zeros?|zero_points?|shift)(?:_inv)?|SCB|absmax|quant_map|g_idx|codebooks?"
)
# The layer that a tensor is of: `X` of `X.qweight`, of `X.weight._data` and of `X.centroids.weight`.
_LAYER = re.compile(r"(.+?)\.(?:weight\..+|\w*centroids\.weight|[^.]+)")
# Integers that say where something stands.
_PLACES = re.compile(r"\w*(?:pos|relative|bias|mask|ids)\w*")


def is_quantised(info: TensorInfo) -> bool:
    """Whether a type or a name says that a tensor is a quantised weight: float8, packed, or what quantisers call so."""
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
    layers = {_layer(name) for name in touched if _SCALE.fullmatch(_leaf(name))}
    around = [name for name in touched if _layer(name) and not _SCALE.fullmatch(_leaf(name))]
    quantised = [info for info in model.tensors.values() if is_quantised(info)]
    quantised += _without_weight(model, {_layer(info.name) for info in quantised})
    found = {info.name: info for info in quantised if _is_in_reach(info, wanted, layers, around)}
    return list(_by_pattern(found))


def _without_weight(model: Checkpoint, known: Collection[str]) -> list[TensorInfo]:
    """What stands for the weights of layers that have integers and scales instead, whatever it is called.

    Of each layer the largest, which explains the others. Integers of a layer with a weight, and of a module of
    several layers, are its buffers.
    """
    floats = {_layer(name) for name, info in model.tensors.items() if info.dtype in FLOATS}
    modules = {parent for layer in floats for parent in _parents(layer)}
    is_told = "quantization_config" in model.config
    found: dict[str, TensorInfo] = {}
    for info in filter(_may_stand_for_weight, model.tensors.values()):
        layer = _layer(info.name)
        has_weight = layer in known or f"{layer}.weight" in model.tensors
        if not has_weight and layer not in modules and (is_told or layer in floats):
            found[layer] = max(found.get(layer, info), info, key=lambda one: one.size)
    return list(found.values())


def _may_stand_for_weight(info: TensorInfo) -> bool:
    is_whole = info.dtype in INTEGERS and info.dtype != "BOOL" and info.size > 1
    is_place = is_buffer(info.name, info.shape) or _PLACES.fullmatch(_leaf(info.name)) is not None
    return is_whole and in_block(info.name) and not is_place


def _is_in_reach(
    info: TensorInfo, wanted: Callable[[str, tuple[int, ...]], bool], layers: set[str], around: list[str]
) -> bool:
    layer = _layer(info.name)
    as_weight = f"{layer}.weight" if layer else "weight"
    # Packed ones have neither the weight's name nor its shape: any shape of a matrix stands for that.
    if wanted(info.name, info.shape) or wanted(as_weight, (2, 2)):
        return True
    return layer in layers or any(name.startswith(info.name) for name in around)


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


def _layer(name: str) -> str:
    found = _LAYER.fullmatch(name)
    return found[1] if found else ""


def _parents(layer: str) -> Iterator[str]:
    while layer := layer.rpartition(".")[0]:
        yield layer
