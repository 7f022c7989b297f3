"""Writing a checkpoint as its base stands: names, key set, sharding, types, and the files beside them."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nufilt_jax.checkpoints import flax_files, safetensors_files
from nufilt_jax.checkpoints.beside import files_beside, names_below, not_to_copy
from nufilt_jax.checkpoints.dtypes import FLOATS, OUTPUT_DTYPES, AnyArray, code_of
from nufilt_jax.checkpoints.folders import FLAX, FORMATS
from nufilt_jax.checkpoints.names import has_flax_form
from nufilt_jax.checkpoints.outputs import OutputTensor, plan_shards, stored_bytes
from nufilt_jax.checkpoints.reader import Checkpoint
from nufilt_jax.checkpoints.safetensors_files import Piece
from nufilt_jax.durable import atomic_write, make_folder, sync_tree
from nufilt_jax.errors import CheckpointError, ConfigError, OutputError, Problem, raise_all


def write_checkpoint(
    params: Mapping[str, AnyArray],
    out: Path,
    *,
    like: Checkpoint,
    format: str | None = None,
    dtype: str | None = None,
    part: tuple[int, int] = (0, 1),
) -> tuple[Path, ...]:
    """Writes a model into the folder `out`, which the caller renames when all is well.

    Args:
      params: new values by canonical name; every other tensor is copied bit for bit from `like`.
      out: a new or empty folder.
      like: gives names, key set, sharding, types, and the files beside the weights.
      format: `safetensors` or `flax` (`msgpack` is the same); None for that of `like`.
      dtype: `float32`, `bfloat16` or `float16` for every floating tensor; None for their own types.
      part: (i, n) writes every n-th weight file from number i on; all that is no weights belongs to part 0.

    Returns:
      The weight files written, without the index.

    Raises:
      CheckpointError: `params` has unknown names, wrong shapes or types, or numbers out of range.
      ConfigError: `format` or `dtype` is unknown.
      OutputError: the folder cannot be written, as when the disk is full.
    """
    kind = _checked_format(format, like)
    code = _checked_dtype(dtype)
    raise_all(CheckpointError, [*value_problems(params, like), *not_to_copy(like.path)])
    new = {_main_name(name, like): value for name, value in params.items()}
    index, step = part
    whole = plan_shards(like, kind, code)
    shards = {file: whole[file] for file in list(whole)[index::step]}
    try:
        make_folder(out)
        raise_all(CheckpointError, _write_shards(new, out, like, shards, kind))
        if index == 0:
            if like.index_file and kind == like.format:
                _write_index(out / like.index_file, like.index_metadata, whole)  # of all parts, whoever writes them
            _copy_files(like, out, dtype)
        if step == 1:  # else others are writing here; what this process wrote has reached the disk
            sync_tree(out)
    except OSError as error:
        raise output_error(out, error) from error
    return tuple(out / file for file in shards)


def output_error(out: Path, error: OSError) -> OutputError:
    """One line for a failure of the disk."""
    if isinstance(error, OutputError):
        return error
    what = f"cannot be written: {error.strerror or error}"
    where = error.filename2 or error.filename or out  # of a copy the first is what was read
    return OutputError(Problem(str(where), what, "free some space or choose another folder"))


def value_problems(params: Mapping[str, AnyArray], like: Checkpoint) -> Iterator[Problem]:
    """What keeps `params` from being written like a checkpoint: names, shapes, kinds, torn ties."""
    if not like.is_local:
        yield Problem(like.source, "only its headers were fetched", "open it without headers_only")
    names = {copy.name: info for info in like.tensors.values() for copy in (info, *info.aliases)}
    for name, value in params.items():
        info = names.get(name)
        if info is None:
            yield Problem(like.source, "has no such tensor", "remove it, or choose another `like`", name)
        elif tuple(value.shape) != info.shape:
            what = f"has shape {list(info.shape)}, the new value {list(value.shape)}"
            yield Problem(str(info.file), what, "weights are [d_out, d_in]", info.stored_name)
        elif (code_of(str(value.dtype)) in FLOATS) != (info.dtype in FLOATS):
            what = f"holds {info.dtype}, the new value {value.dtype}"
            yield Problem(str(info.file), what, "leave it out to copy it", info.stored_name)
        elif name != info.name and info.name in params and params[info.name] is not value:
            what = f"is tied to {info.stored_name}, but was given a value of its own"
            yield Problem(str(info.file), what, "give one of the two", name)


def _checked_format(format: str | None, like: Checkpoint) -> str:
    if format is None:
        return like.format
    if format not in FORMATS:
        raise ConfigError(Problem("--format", f"must be safetensors or flax, not {format!r}"))
    kind = FORMATS[format]
    if kind == FLAX != like.format and not has_flax_form(like.config):
        what = f"{like.source} is a {like.config.get('model_type')!r} model, which has no Flax form"
        raise ConfigError(Problem("--format", what, "use safetensors"))
    return kind


def _checked_dtype(dtype: str | None) -> str | None:
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise ConfigError(Problem("--dtype", f"must be one of {', '.join(OUTPUT_DTYPES)}, not {dtype!r}"))
    return None if dtype is None else OUTPUT_DTYPES[dtype]


def _main_name(name: str, like: Checkpoint) -> str:
    """The listed name of a tensor that may have been given by an alias."""
    if name in like.tensors:
        return name
    return next(info.name for info in like.tensors.values() if name in {a.name for a in info.aliases})


def _write_shards(
    new: Mapping[str, AnyArray], out: Path, like: Checkpoint, shards: Mapping[str, list[OutputTensor]], kind: str
) -> list[Problem]:
    """Writes weight files; returns the tensors that are out of the range of their type."""
    lost: list[Problem] = []
    for file, targets in shards.items():
        pieces = [Piece(t.name, t.dtype, t.shape, stored_bytes(t, new.get(t.main), lost)) for t in targets]
        (out / file).parent.mkdir(parents=True, exist_ok=True)  # an index may name shards in subfolders
        if kind == FLAX:
            flax_files.write_file(out / file, pieces)
        else:
            metadata = like.metadata[file] if like.format == kind else {"format": "pt"}
            safetensors_files.write_file(out / file, pieces, metadata)
    return lost


def _write_index(path: Path, metadata: Mapping[str, Any], shards: Mapping[str, list[OutputTensor]]) -> None:
    total = sum(target.nbytes for targets in shards.values() for target in targets)
    weight_map = {target.name: file for file, targets in shards.items() for target in targets}
    _write_json(path, {"metadata": {**metadata, "total_size": total}, "weight_map": weight_map}, sort=True)


def _write_json(path: Path, content: object, *, sort: bool = False) -> None:
    text = json.dumps(content, indent=2, sort_keys=sort, ensure_ascii=False) + "\n"
    atomic_write(path, text.encode(errors="backslashreplace"))  # as JSON spells halves of characters


def _copy_files(like: Checkpoint, out: Path, dtype: str | None) -> None:
    """Copies what lies beside the weights; the config says the new type if it said the old one."""
    merged = {path.relative_to(like.path).as_posix() for path in like.weight_files}  # some may be in subfolders
    within = out.resolve()
    for relative in files_beside(names_below(like.path)):
        # The output may lie inside the base's folder, and is no part of it.
        if relative in merged or (like.path / relative).resolve().is_relative_to(within):
            continue
        (out / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(like.path / relative, out / relative)
    if dtype is not None and like.config:
        _write_json(out / "config.json", _with_dtype(like.config, dtype))


def _with_dtype(config: Any, dtype: str) -> Any:
    """A config whose `dtype` (`torch_dtype` before transformers 5) is changed, in sub-configs too."""
    if not isinstance(config, dict):
        return config
    is_dtype = {key: key in ("dtype", "torch_dtype") and value in OUTPUT_DTYPES for key, value in config.items()}
    return {key: dtype if is_dtype[key] else _with_dtype(value, dtype) for key, value in config.items()}
