"""Loading and saving in one call."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nufilt_jax.checkpoints.added import added_problems, is_added, read_added, write_added
from nufilt_jax.checkpoints.dtypes import NumpyArray
from nufilt_jax.checkpoints.folders import ADDED
from nufilt_jax.checkpoints.hub import parse_source
from nufilt_jax.checkpoints.reader import Checkpoint, open_checkpoint
from nufilt_jax.checkpoints.writer import output_error, write_checkpoint
from nufilt_jax.durable import make_folder, move
from nufilt_jax.errors import CheckpointError, OutputError, Problem, raise_all
from nufilt_jax.values import array_problems, native

Source = str | os.PathLike[str]


def load(source: Source, *, offline: bool = False) -> dict[str, NumpyArray]:
    """Weights of a model by canonical name, every linear weight `[d_out, d_in]`; also what a merge added to them.

    Args:
      source: `PATH_OR_HUB[@REV]`.
      offline: use the local Hub cache alone.

    Raises:
      CheckpointError: with everything that is wrong with the folder.
    """
    name, revision = parse_source(os.fspath(source))
    model = open_checkpoint(name, revision=revision, offline=offline)
    added = read_added(model.path)
    raise_all(CheckpointError, added_problems(added, model, str(model.path / ADDED)))
    return model.read() | added


def save(
    params: Mapping[str, Any],  # what is no array is refused by name
    out: Source,
    *,
    like: Source | Checkpoint,
    format: str | None = None,
    dtype: str | None = None,
    offline: bool = False,
) -> None:
    """Writes a model folder, whole or not at all: beside its place, then renamed.

    Args:
      params: values by canonical name; tensors that are not given are copied from `like`. Gates and experts that a
        merge added go into a file of their own, in float32.
      out: a folder that does not exist or is empty.
      like: the model whose names, sharding, types and other files to take, as a source or opened.
      format: `safetensors` or `flax`; None for that of `like`.
      dtype: `float32`, `bfloat16` or `float16`; None for the types of `like`.
      offline: look for `like` in the local Hub cache alone.

    Raises:
      CheckpointError: `params` does not fit `like`, or `like` cannot be read.
      OutputError: `out` is in use, or cannot be written.
    """
    out = Path(os.path.expanduser(out))
    check_place(out)
    raise_all(CheckpointError, array_problems(params, "params"))
    params = {name: native(x) for name, x in params.items()}
    model = like if isinstance(like, Checkpoint) else _opened(os.fspath(like), offline)
    known = {copy.name for info in model.tensors.values() for copy in info.copies}
    own = {name: x for name, x in params.items() if name in known or not is_added(name)}
    added = read_added(model.path) | {name: x for name, x in params.items() if name not in own}
    raise_all(CheckpointError, added_problems(added, model, "params"))
    staging = _beside(out)
    try:
        make_folder(staging)
        write_checkpoint(own, staging, like=model, format=format, dtype=dtype)
        if added:
            write_added(staging, added)
        move(staging, out)
    except OSError as error:
        raise output_error(out, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_place(out: Path) -> None:
    """Refuses a place where `save` can write nothing; leaves it as it was.

    Raises:
      OutputError: it is in use, or cannot be written.
    """
    made: list[Path] = []
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(Problem(str(out), "exists and is not an empty folder", "choose another, or remove it"))
        missing = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
        # Tried, as permissions alone do not tell: of a disk that is full, or a name that is too long.
        for folder in (*reversed(missing), _beside(out)):
            folder.mkdir()
            made.append(folder)
    except OutputError:
        raise
    except OSError as error:
        raise output_error(out, OSError(error.errno, error.strerror)) from error
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another saves there now
                folder.rmdir()


def _beside(out: Path) -> Path:
    """A name of its own, as others may be saving to this place; beside it, as no rename leaves a file system."""
    return out.parent / f".{out.name}.{secrets.token_hex(4)}"


def _opened(source: str, offline: bool) -> Checkpoint:
    name, revision = parse_source(source)
    return open_checkpoint(name, revision=revision, offline=offline, role="base")
