"""A model folder, local or on the Hub, and which of its files are the weights."""

import dataclasses
import os
import re
from collections.abc import Collection, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Protocol, runtime_checkable

from nufilt_jax.errors import Problem

SAFETENSORS = "safetensors"
FLAX = "flax"
PEFT = "peft"  # an adapter, which needs its base
FORMATS = {"safetensors": SAFETENSORS, "flax": FLAX, "msgpack": FLAX}  # as they may be asked for
ADDED = "added_parameters.safetensors"  # what a merge added to its model, see `added`

# Of a whole model, or of one of its shards' index; what transformers calls it comes before what diffusers does.
_NAMES = {
    SAFETENSORS: ("model.safetensors", "diffusion_pytorch_model.safetensors"),
    FLAX: ("flax_model.msgpack",),
}
_INDEX = ".index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

_WEIGHTS = re.compile(
    r"\.(safetensors|msgpack|bin|pt|pth|ckpt|h5|ot|onnx|onnx_data|gguf|ggml|pkl|pickle|tflite|pb|mlmodel|distcp)"
    r"([._-]?(data|\d+))?(\.index(\.\w+)?\.json|\.index|\.meta|\.data-.*)?(\.(tmp|part|partial|incomplete|aria2))?$"
    # Other archives of arrays are a part of the model, as the `mel_filters.npz` of its own code.
    r"|(^|/)((flax|tf|pytorch)_)?(model|weights|params|checkpoint)[^/]*\.npz$",
    re.IGNORECASE,
)
_PICKLE = re.compile(r"\.(bin|pt|pth|ckpt|pkl|pickle)$", re.IGNORECASE)
_VOCABULARY = re.compile(r"(^|/)(tokenizer|vocab)[^/]*\.(pkl|pickle)$", re.IGNORECASE)  # copied, never opened
_SUBFOLDER = re.compile(r"(snapshots/)?[^/]+")
_MLX = "adapters.safetensors"
# Beside the weights of a checkpoint, or instead of them where they are in subfolders.
_TRAINING = re.compile(
    r"(training_args|optimizer|scheduler|scaler|sampler|rng_state|random_states)\b|(rng_state|random_states)_"
)
_PIECE = re.compile(r"(^|/)((bf16_|fp16_)?zero_pp_rank_\d+|mp_rank_\d+)[^/]*_states\.pt$|\.distcp$")
_MOST_LISTED = 8
_SMALL = re.compile(r"(\.(json|txt|model|jinja|md|yaml|yml)|^LICENSE.*|^NOTICE.*)$", re.IGNORECASE)

CONVERT = (
    "convert it where you trust it: load it with transformers 4.35 or later and call save_pretrained(folder), which "
    "writes safetensors"
)


@runtime_checkable
class Folder(Protocol):
    """What reading a checkpoint needs of a folder, wherever it is."""

    def files(self) -> list[str]:
        """Names of the files, relative to the folder."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a file, in a subfolder perhaps."""
        ...

    def open(self, name: str) -> BufferedReader:
        """Opens a file for reading."""
        ...


@dataclasses.dataclass(frozen=True)
class LocalFolder:
    """A folder on disk; links, as the Hub cache makes them, are followed."""

    path: Path

    def files(self) -> list[str]:
        """Names of the files directly in the folder; broken links are none."""
        with os.scandir(self.path) as entries:
            return sorted(entry.name for entry in entries if entry.is_file())

    def has(self, name: str) -> bool:
        """Whether there is such a file, in a subfolder perhaps."""
        return (self.path / name).is_file()

    def open(self, name: str) -> BufferedReader:
        """Opens a file for reading."""
        return (self.path / name).open("rb")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The weights of a folder: their format, and one file or an index naming the shards."""

    format: str
    file: str
    is_index: bool


def find_weights(names: Collection[str]) -> Layout | None:
    """The weights to read: safetensors before Flax, one file before shards, then adapters; None if there are none."""
    for kind, file in ((kind, file) for kind, files in _NAMES.items() for file in files):
        if file in names:
            return Layout(kind, file, is_index=False)
        if file + _INDEX in names:
            return Layout(kind, file + _INDEX, is_index=True)
    if ADAPTER_CONFIG in names and ADAPTER in names:
        return Layout(PEFT, ADAPTER, is_index=False)
    return None


def single_file(kind: str) -> str:
    """Name of the weight file of an unsharded model."""
    return _NAMES[kind][0]


def no_weights_problem(where: str, names: Collection[str]) -> Problem:
    """Says why nothing in a folder can be read as weights."""
    if ADAPTER_CONFIG in names and "adapter_model.bin" in names:
        what = "is a pickle, which can run any code when loaded, and the adapter has no other weights"
        fix = "load it with peft 0.6 or later where you trust it and call save_pretrained(folder)"
        return Problem(f"{where}/adapter_model.bin", what, f"{fix}, which writes safetensors")
    if _MLX in names and ADAPTER not in names:
        fix = f"fuse it with its base first: mlx_lm.fuse --model BASE --adapter-path {where}"
        return Problem(where, "is an adapter of MLX, which is not read", fix)
    if ADAPTER_CONFIG in names:
        return Problem(where, f"is a PEFT adapter without its {ADAPTER}", "download or save it again")
    if ADAPTER in names:
        return Problem(where, f"holds {ADAPTER} without its {ADAPTER_CONFIG}", "download or save it again")
    if "model_index.json" in names:
        what = "is a diffusers pipeline: its components are models of their own"
        return Problem(where, what, _component_to_give(where, names))
    own = [name for name in names if "/" not in name and not _TRAINING.match(name) and not _PIECE.search(name)]
    return (
        _in_other_formats(where, own)
        or _below(where, names)
        or _in_pieces(where, names)
        or _in_other_formats(where, names)
        or Problem(where, "holds no weights", f"expected {single_file(SAFETENSORS)} or {single_file(FLAX)}")
    )


def _in_other_formats(where: str, names: Collection[str]) -> Problem | None:
    if pickles := sorted(filter(is_pickle, names)):
        what = "is a pickle, which can run any code when loaded, and the folder has no other weights"
        return Problem(f"{where}/{pickles[0]}", what, CONVERT)
    if others := sorted(filter(is_weight_file, names)):
        expected = f"neither {single_file(SAFETENSORS)} nor {single_file(SAFETENSORS)}{_INDEX} nor their Flax forms"
        return Problem(where, f"holds {others[0]}, but {expected}", "save it with transformers' save_pretrained")
    return None


def _below(where: str, names: Collection[str]) -> Problem | None:
    """Of a run's folder of checkpoints, a save of several adapters, or a model in the Hub's cache."""
    if not components(where, names):
        return None
    return Problem(where, "holds no weights of its own, but its subfolders do", _component_to_give(where, names))


def _in_pieces(where: str, names: Collection[str]) -> Problem | None:
    """Of a checkpoint as several devices wrote it."""
    found = sorted(name for name in {*names, *_names_inside(where)} if _PIECE.search(name))
    if not found:
        return None
    folder = "/".join([where, *found[0].split("/")[:-1]])
    if found[0].endswith(".distcp"):
        what = "is a distributed checkpoint of torch, which holds the weights in pieces"
        return Problem(folder, what, f"put them together: accelerate merge-weights {folder} OUT")
    what = "is a checkpoint of DeepSpeed, which holds the weights in pieces"
    above = re.sub(r"/+global_?step\d+$", "", folder)  # which has the converter and says what is the latest
    fix = "put them together where you trust it: python zero_to_fp32.py"
    return Problem(folder, what, f"{fix} {above} OUT --safe_serialization")


def unreadable(error: OSError, where: str | Path) -> Problem:
    """Says why a file or folder cannot be read: the one that the system names, or else `where`."""
    what = f"cannot be read: {error.strerror or error}"
    return Problem(str(error.filename or where), what, "check the folder and its permissions")


def is_weight_file(name: str) -> bool:
    """Whether a file holds weights or their index, in any format ever seen in a model folder."""
    return bool(_WEIGHTS.search(name)) and not _VOCABULARY.search(name)


def is_pickle(name: str) -> bool:
    """Whether a weight file can run any code when it is loaded."""
    return bool(_PICKLE.search(name)) and not _VOCABULARY.search(name)


def is_small(name: str) -> bool:
    """Whether a file is a config, tokenizer, licence or the like."""
    return bool(_SMALL.search(name))


def components(where: str, names: Collection[str]) -> list[str]:
    """The subfolders whose weights can be read, of a folder on disk or among the names of a Hub repository."""
    inside: dict[str, set[str]] = {}
    for folder, _, file in (name.rpartition("/") for name in (*names, *_names_inside(where))):
        inside.setdefault(folder, set()).add(file)
    held = [folder for folder, files in inside.items() if _SUBFOLDER.fullmatch(folder) and find_weights(files)]
    return sorted(held, key=lambda folder: re.sub(r"\d+", lambda step: step[0].zfill(20), folder))


def _names_inside(where: str) -> Iterator[str]:
    """What subfolders hold on disk, and those of a model's snapshots in the Hub's cache."""
    root = Path(os.path.expanduser(where))
    for pattern in ("*/*", "snapshots/*/*"):
        yield from (path.relative_to(root).as_posix() for path in root.glob(pattern))


def _component_to_give(where: str, names: Collection[str]) -> str:
    held = components(where, names)
    if not held:
        return f"none of them has {' or '.join(_NAMES[SAFETENSORS])}: save it again, without a variant"
    if not os.path.isdir(os.path.expanduser(where)):  # the Hub gives whole repositories alone
        return f"download it and give the folder of one: {_listed(held)}"
    return f"give the folder of one: {_listed([f'{where}/{name}' for name in held])}"


def _listed(folders: list[str]) -> str:
    """The last of them, if they are many: of a run's checkpoints the latest."""
    more = len(folders) - _MOST_LISTED
    return ", ".join(folders[-_MOST_LISTED:]) + (f", or one of {more} others" if more > 0 else "")
