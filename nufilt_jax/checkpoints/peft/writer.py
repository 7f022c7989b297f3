"""Writing an adapter as a PEFT folder."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nufilt_jax.checkpoints import safetensors_files
from nufilt_jax.checkpoints.dtypes import OUTPUT_DTYPES, AnyArray, cast, numpy_dtype, overflows
from nufilt_jax.checkpoints.folders import ADAPTER, FLAX
from nufilt_jax.checkpoints.newer_names import is_saved_by_newer, newer_names
from nufilt_jax.checkpoints.peft.config import CONFIG
from nufilt_jax.checkpoints.peft.experts import is_expert, missing_experts
from nufilt_jax.checkpoints.peft.keys import PREFIX
from nufilt_jax.checkpoints.reader import Checkpoint
from nufilt_jax.checkpoints.safetensors_files import Piece
from nufilt_jax.checkpoints.writer import output_error
from nufilt_jax.durable import atomic_write, make_folder
from nufilt_jax.errors import OutputError, Problem, raise_all

_CLASSIFIERS = ("classifier", "score")
# The heads that peft trains and saves by itself, by type of task; it knows one by the end of the module's name.
_HEADS = {"SEQ_CLS": _CLASSIFIERS, "TOKEN_CLS": _CLASSIFIERS, "QUESTION_ANS": ("qa_outputs",)}
FactorPair = tuple[Float[np.ndarray, "r d_in"], Float[np.ndarray, "d_out r"]]


@dataclasses.dataclass(frozen=True)
class NewPair:
    """The factors of one module, made when they are written.

    Attributes:
      rank: r.
      shape: `[d_out, d_in]`.
      made: gives A and B, of which the product is the change.
    """

    rank: int
    shape: tuple[int, ...]
    made: Callable[[], FactorPair]


def saved_by_type(module: str, task_type: str | None) -> bool:
    """Whether peft keeps a module whole because of its adapter's type of task, without being told to."""
    return any(part.endswith(_HEADS.get(str(task_type), ())) for part in module.split("."))


def lacking_head(base: Checkpoint, task_type: str | None) -> str:
    """What peft looks for beside an adapter of a type of task and a base does not store; empty if it lacks nothing."""
    modules = (name.rpartition(".")[0] for name in base.tensors)
    return "" if any(saved_by_type(x, task_type) for x in modules) else " or ".join(_HEADS.get(str(task_type), ()))


def stored_module(base: Checkpoint, name: str) -> str:
    """What the base's file calls the module of a weight."""
    stored = name if base.format == FLAX else base.tensors[name].stored_name
    return stored.removesuffix(".weight")


def module_of(base: Checkpoint, name: str) -> str:
    """What the model's class calls the module of a weight, in the series of transformers that saved the base."""
    module = stored_module(base, name)
    return newer_names([module], base.config)[module] if is_saved_by_newer(base.config) else module


def write_adapter(
    out: Path,
    pairs: Mapping[str, NewPair],
    base: Checkpoint,
    *,
    whole: Mapping[str, AnyArray] | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> None:
    """Writes an adapter into the folder `out`, which the caller renames when all is well.

    Args:
      out: a new or empty folder.
      pairs: by module, as the model's class calls it.
      base: which it is for.
      whole: tensors that stand in place of the base's, by their names in the model's class.
      settings: what else its config says, as its task type.
      dtype: `float32`, `bfloat16` or `float16`; None for float32.

    Raises:
      OutputError: the folder cannot be written, or numbers are out of the range of the type.
    """
    code = OUTPUT_DTYPES[dtype or "float32"]
    lost: list[Problem] = []
    pieces = []
    pairs = _of_even_experts(pairs, base)
    for module, pair in pairs.items():
        (m, n), r = pair.shape, pair.rank
        # A and B come from one call: the pieces of a file are written in the order of this list.
        kept: list[np.ndarray] = []
        for letter, shape in (("A", (r, n)), ("B", (m, r))):
            name = f"{PREFIX}{module}.lora_{letter}.weight"
            data = _Data(lambda pair=pair, kept=kept: _half(pair, kept), code, name, lost)
            pieces.append(Piece(name, code, shape, data))
    for name, value in (whole or {}).items():
        data = _Data(lambda value=value: np.asarray(value), code, PREFIX + name, lost)
        pieces.append(Piece(PREFIX + name, code, tuple(value.shape), data))
    try:
        make_folder(out)
        safetensors_files.write_file(out / ADAPTER, pieces, {"format": "pt"})
        text = json.dumps(_config(pairs, base, tuple(whole or ()), dict(settings or {})), indent=2, sort_keys=True)
        atomic_write(out / CONFIG, text.encode() + b"\n")
    except OSError as error:
        raise output_error(out, error) from error
    raise_all(OutputError, lost)


def _of_even_experts(pairs: Mapping[str, NewPair], base: Checkpoint) -> dict[str, NewPair]:
    """All experts of a block in the config's rank, filled up with zeros: peft stacks them for transformers 5."""
    if not is_saved_by_newer(base.config):
        return dict(pairs)
    most = max((pair.rank for pair in pairs.values()), default=1)
    every = {**pairs, **{module: _none(shape) for module, shape in missing_experts(pairs, base).items()}}
    return {
        module: NewPair(most, pair.shape, functools.partial(_filled, pair.made, most))
        if is_expert(module) and pair.rank < most
        else pair
        for module, pair in every.items()
    }


def _none(shape: tuple[int, ...]) -> NewPair:
    """No change."""
    m, n = shape
    return NewPair(0, shape, lambda: (np.zeros((0, n), np.float32), np.zeros((m, 0), np.float32)))


def _filled(made: Callable[[], FactorPair], rank: int) -> FactorPair:
    a, b = made()
    more = rank - a.shape[0]
    return np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))


def _half(pair: NewPair, kept: list[np.ndarray]) -> np.ndarray:
    """A when it is asked for first, then B."""
    if not kept:
        kept += balanced(*pair.made())
    return kept.pop(0)


def balanced(a: Float[np.ndarray, "r d_in"], b: Float[np.ndarray, "d_out r"]) -> FactorPair:
    """The same product, of rows and columns of equal norms: narrow types hold both best so."""
    sizes = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0)
    is_used = (sizes[0] > 0) & (sizes[1] > 0)  # where one is zero the product is, however it is scaled
    scale = np.sqrt(np.where(is_used, sizes[1], 1) / np.where(is_used, sizes[0], 1)).astype(a.dtype)
    return a * scale[:, None], b / scale


class _Data:
    """The bytes of a tensor, made when they are written."""

    def __init__(self, made: Callable[[], np.ndarray], code: str, name: str, lost: list[Problem]) -> None:
        self._made, self._code, self._name, self._lost = made, code, name, lost

    def __iter__(self) -> Any:
        value, dtype = np.ascontiguousarray(self._made()), numpy_dtype(self._code)
        rounded = value if dtype is None else cast(value, dtype)
        if not np.isfinite(value).all() or overflows(value, rounded):
            what = f"has numbers out of the range of {dtype}"
            self._lost.append(Problem(ADAPTER, what, "write a wider --dtype", self._name))
        yield np.ascontiguousarray(rounded).reshape(-1).view(np.uint8).data


def _config(
    pairs: Mapping[str, NewPair], base: Checkpoint, whole: tuple[str, ...], settings: dict[str, Any]
) -> dict[str, Any]:
    """Of α = r everywhere, so that s is 1."""
    ranks = {module: pair.rank for module, pair in pairs.items()}
    most = max(ranks.values(), default=1)
    others = {module: rank for module, rank in ranks.items() if rank != most}
    local = base.source if base.revision is not None else str(base.path.resolve())
    biases = [name for name in whole if name.endswith(".bias")]
    modules = sorted({name.rpartition(".")[0] for name in whole if name not in biases})
    saved = [module for module in modules if not saved_by_type(module, settings.get("task_type"))]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": local,
        "revision": base.revision,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "target_modules": sorted(ranks),
        "modules_to_save": saved or None,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": any(info.axes == (1, 0) for info in base.tensors.values()) and base.format != FLAX,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    } | settings
