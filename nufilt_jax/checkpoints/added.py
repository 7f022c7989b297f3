"""Parameters that a merge adds to its model, in a file of their own: model classes know nothing of them.

`added_parameters.safetensors` holds gates and experts in float32, under canonical names.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from nufilt_jax.checkpoints import safetensors_files
from nufilt_jax.checkpoints.dtypes import AnyArray, NumpyArray
from nufilt_jax.checkpoints.folders import ADDED, SAFETENSORS
from nufilt_jax.checkpoints.reader import Checkpoint, tensor_info
from nufilt_jax.checkpoints.safetensors_files import Piece
from nufilt_jax.checkpoints.tensors import map_tensors
from nufilt_jax.checkpoints.writer import output_error
from nufilt_jax.durable import replacing
from nufilt_jax.errors import CheckpointError, Problem, raise_all

_NAME = re.compile(r".+\.(gate\.(weight|bias)|experts\.\d+\.[ab])")
_FACTOR = re.compile(r"(?P<stem>(?P<matrix>.+)\.experts\.\d+)\.[ab]")
_AGAIN = "copy the folder or merge again"


def is_added(name: str) -> bool:
    """Whether a parameter that the base lacks may be a gate's or an expert's."""
    return _NAME.fullmatch(name) is not None


def write_added(folder: Path, added: Mapping[str, AnyArray]) -> Path:
    """Writes added parameters beside a model's weights, whole or not at all.

    Args:
      folder: exists.
      added: by canonical name; written in float32.

    Raises:
      OutputError: the file cannot be written.
    """
    path = folder / ADDED
    try:
        with replacing(path) as draft:
            pieces = (_piece(name, added[name]) for name in sorted(added))
            safetensors_files.write_file(draft, pieces, {"format": "pt"})
    except OSError as error:
        raise output_error(path, error) from error
    return path


def _piece(name: str, value: AnyArray) -> Piece:
    stored = np.ascontiguousarray(np.asarray(value), np.dtype("<f4"))
    return Piece(name, "F32", stored.shape, [stored.reshape(-1).view(np.uint8).data])


def read_added(folder: Path) -> dict[str, NumpyArray]:
    """Added parameters by canonical name, as views of the mapped file; none if the folder has no such file.

    Raises:
      CheckpointError: the file is damaged, or holds something else.
    """
    path = folder / ADDED
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        header = safetensors_files.read_header(file, str(path))
    foreign = [
        Problem(str(path), f"is no gate or expert in float32, but {entry.dtype}", _AGAIN, entry.name)
        for entry in header.entries
        if entry.dtype != "F32" or not is_added(entry.name)
    ]
    raise_all(CheckpointError, [*header.problems, *foreign])
    return map_tensors(tensor_info(entry.name, entry, path, SAFETENSORS, {}) for entry in header.entries)


def added_problems(added: Mapping[str, AnyArray], model: Checkpoint, where: str) -> Iterator[Problem]:
    """What keeps added parameters from belonging to a model: names that it has, and factors that do not fit.

    Args:
      added: by canonical name.
      model: the model that they were added to.
      where: what to call their place in messages.
    """
    stored = {copy.name for info in model.tensors.values() for copy in info.copies}
    for name, value in added.items():
        if name in stored:
            yield Problem(where, "is in the model's own weights too", _AGAIN, name)
        if (found := _FACTOR.fullmatch(name)) is None:
            continue
        matrix = model.tensors.get(f"{found['matrix']}.weight")
        a, b = (tuple(added.get(f"{found['stem']}.{part}", np.empty(0)).shape) for part in "ab")
        if matrix is None or len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != matrix.shape:
            what = f"has shape {list(value.shape)} and fits no matrix"
            if matrix is not None:
                made = f"{found['matrix']}.weight of {list(matrix.shape)}"
                what = f"has shape {list(value.shape)}; with its partner it does not make up {made}"
            yield Problem(where, what, _AGAIN, name)
