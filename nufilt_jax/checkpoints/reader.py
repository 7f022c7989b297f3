"""Opening a checkpoint: all headers read, all faults of the folder found, no weight touched."""

import dataclasses
import hashlib
import threading
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from nufilt_jax.checkpoints import flax_files, safetensors_files
from nufilt_jax.checkpoints.dtypes import NumpyArray, numpy_dtype
from nufilt_jax.checkpoints.folders import (
    ADAPTER_CONFIG,
    ADDED,
    FLAX,
    PEFT,
    Folder,
    Layout,
    find_weights,
    no_weights_problem,
    unreadable,
)
from nufilt_jax.checkpoints.hub import Place, locate
from nufilt_jax.checkpoints.index import Index, disagreements, missing_shards, parse_index
from nufilt_jax.checkpoints.names import canonical_names, flax_axes, from_flax_name
from nufilt_jax.checkpoints.orientation import stored_axes, with_conv1d
from nufilt_jax.checkpoints.safetensors_files import HEADER_MARK, Entry, Header
from nufilt_jax.checkpoints.tensors import TensorInfo, UnreadTensors, map_tensors, stream_spans
from nufilt_jax.checkpoints.ties import tie
from nufilt_jax.errors import CheckpointError, Problem, raise_all
from nufilt_jax.strict_json import MOST_BYTES, JsonError, read_object

Role = Literal["base", "task"]
_NO_MODEL = ("is a PEFT adapter, no model", "merge it as --task NAME=FOLDER onto its base")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model folder whose headers have been read and found sound.

    Attributes:
      source: as the user wrote it, without `@REV`.
      revision: commit hash of a Hub model; None for a local folder.
      path: the folder on disk.
      format: `safetensors` or `flax`.
      config: content of `config.json`; may be empty for a task.
      tensors: by canonical name; of tied tensors only one is listed.
      weight_files: in the order of the index.
      metadata: of each safetensors file's header, by file name; writing keeps it.
      index_file: name of the index if the model is sharded.
      index_metadata: what the index says beside the weight map.
      is_local: False if only headers were fetched from the Hub, so that no weight can be read.
      has_added: whether parameters that a merge added stand beside its weights.
      notices: what the user should know of how it is read.
    """

    source: str
    revision: str | None
    path: Path
    format: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    weight_files: tuple[Path, ...]
    metadata: Mapping[str, Mapping[str, str]]
    index_file: str | None = None
    index_metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_local: bool = True
    has_added: bool = False
    notices: tuple[str, ...] = ()

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """What lies in its own files."""
        return tuple(self.tensors.values())

    def read(self, names: Iterable[str] | None = None) -> dict[str, NumpyArray]:
        """Weights by canonical name, in canonical orientation and in the file's own type.

        Args:
          names: canonical names; None for all.

        Returns:
          Read-only views of memory-mapped files; they are unmapped when dropped.

        Raises:
          CheckpointError: a name is unknown, numpy cannot hold its type, or the file is not on this machine.
        """
        wanted = list(self.tensors) if names is None else list(dict.fromkeys(names))
        raise_all(CheckpointError, self._unreadable(wanted))
        return map_tensors(self.tensors[name] for name in wanted)

    def unread(self, names: Iterable[str], *, stop: threading.Event | None = None) -> Mapping[str, Any]:
        """Weights as `read` gives them, but each read when it is asked for, and never mapped.

        Args:
          names: canonical names.
          stop: once it is set, reading ends with `CancelledError`.

        Raises:
          CheckpointError: as `read` does.
        """
        wanted = list(dict.fromkeys(names))
        raise_all(CheckpointError, self._unreadable(wanted))
        return UnreadTensors({name: self.tensors[name] for name in wanted}, stop)

    def _unreadable(self, names: Collection[str]) -> Iterable[Problem]:
        if not self.is_local:
            yield Problem(self.source, "only its headers were fetched", "open it without headers_only")
        for name in names:
            info = self.tensors.get(name)
            if info is None:
                yield Problem(self.source, "is not in this checkpoint", tensor=name)
            elif numpy_dtype(info.dtype) is None:
                what = f"has the packed element type {info.dtype}, which cannot be computed with"
                yield Problem(str(info.file), what, tensor=info.stored_name)

    def sha256(self, *, stop: threading.Event | None = None) -> dict[str, str]:
        """Hex digest of every weight file, by file name; once `stop` is set, it ends with `CancelledError`."""
        digests = {}
        for path in self.weight_files:
            digest = hashlib.sha256()
            for piece in stream_spans(path, [(0, path.stat().st_size)], stop=stop):
                digest.update(piece)
            digests[path.relative_to(self.path).as_posix()] = digest.hexdigest()
        return digests

    def sha256_as(self, recorded: Iterable[str]) -> dict[str, str]:
        """The digests that a recipe holds, by the names in it: of whole files, or of safetensors headers alone."""
        names = tuple(recorded)
        if not names or not all(name.endswith(HEADER_MARK) for name in names):
            return self.sha256()
        return self.header_sha256()

    def header_sha256(self) -> dict[str, str]:
        """Hex digest of the header of every safetensors file: of names, shapes and types, and of no number."""
        files = {path.relative_to(self.path).as_posix(): path for path in self.weight_files}
        return {name + HEADER_MARK: safetensors_files.header_sha256(path) for name, path in files.items()}


def open_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    role: Role = "task",
    headers_only: bool = False,
    model_config: Mapping[str, Any] | None = None,
    adapters: bool = False,
) -> Checkpoint:
    """Opens a local folder or a Hub model; reads headers, index and config only.

    Args:
      source: a folder, or a Hub id as in `openai/clip-vit-large-patch14`.
      revision: branch, tag or commit of a Hub model; None for its default branch.
      offline: use the local Hub cache alone.
      role: a base needs a valid `config.json`; a task's is ignored if missing or broken.
      headers_only: write nothing; of a Hub model that is not cached only the headers are fetched.
      model_config: says how the weights lie; the base's for a task, whose own may be missing. None for its own.
      adapters: a PEFT folder may come too: its tensors by stored name, its config that of the adapter.

    Raises:
      CheckpointError: with everything that is wrong with this folder.
    """
    place = locate(source, revision=revision, offline=offline, headers_only=headers_only, whole=role == "base")
    try:
        return _open_at(place, source, role, model_config, adapters=adapters)
    except OSError as error:
        raise CheckpointError(unreadable(error, source)) from error


def _open_at(
    place: Place, source: str, role: Role, model_config: Mapping[str, Any] | None, *, adapters: bool
) -> Checkpoint:
    present = place.folder.files()
    layout = find_weights(present)
    if layout is not None and layout.format == PEFT and not adapters:
        raise CheckpointError(Problem(source, *_NO_MODEL))
    is_adapter = layout is not None and layout.format == PEFT
    file = ADAPTER_CONFIG if is_adapter else "config.json"
    config, config_problems = _read_config(place.folder, file, present, source, needed=is_adapter or role == "base")
    if layout is None:
        raise CheckpointError(no_weights_problem(source, present), *config_problems)
    index, headers, problems = _read_headers(place, layout, source)
    infos, name_problems = _infos(headers, layout.format, place.path, source, model_config or config)
    raise_all(CheckpointError, [*config_problems, *problems, *name_problems])
    return Checkpoint(
        source=source,
        revision=place.revision,
        path=place.path,
        format=layout.format,
        config=config,
        tensors=tie(infos, config, compare_bytes=place.is_local),
        # The numbers of an adapter mean nothing without those of its config, which are hashed with them.
        weight_files=tuple(place.path / name for name in (*headers, *([ADAPTER_CONFIG] if is_adapter else []))),
        metadata={name: header.metadata for name, header in headers.items()},
        index_file=layout.file if layout.is_index else None,
        index_metadata=index.metadata,
        is_local=place.is_local,
        has_added=ADDED in present,
        notices=() if is_adapter or ADAPTER_CONFIG not in present else (_beside(source, layout),),
    )


def _beside(source: str, layout: Layout) -> str:
    """Says that an adapter beside a whole model is not read, which transformers would put onto it."""
    weights = layout.file.removesuffix(".index.json")
    return f"{source}: {weights} is read, and the adapter beside it is not (to merge it, give a folder of it alone)"


def _read_config(
    folder: Folder, name: str, present: Collection[str], where: str, *, needed: bool
) -> tuple[dict[str, Any], list[Problem]]:
    """Content of a config; a fault counts where it is needed."""
    fault = Problem(where, f"has no {name}", "a base must be a whole model folder")
    if name in present:
        try:
            with folder.open(name) as file:
                return read_object(file, lenient=True), []
        except JsonError as error:
            fault = Problem(f"{where}/{name}", str(error), error.fix or "download or save the model again")
    return {}, [fault] if needed else []


def _read_headers(place: Place, layout: Layout, where: str) -> tuple[Index, dict[str, Header], list[Problem]]:
    """The index (empty if there is one file), the header of every weight file, and all faults."""
    folder = place.folder
    index = Index({layout.file: frozenset()}, {}, ())
    if layout.is_index:
        with folder.open(layout.file) as file:
            index = parse_index(file.read(MOST_BYTES + 1), f"{where}/{layout.file}")
    lost = missing_shards(index, {name for name in index.shards if folder.has(name)}, where)
    headers = {name: _read_header(folder, name, layout.format, where) for name in index.shards if folder.has(name)}
    broken = [problem for header in headers.values() for problem in header.problems]
    problems = [*index.problems, *lost, *broken, *_flax_in_safetensors(headers, where)]
    if layout.is_index and not index.problems:
        stored = {name: {e.name: e.shape for e in h.entries} for name, h in headers.items() if not h.problems}
        problems += disagreements(index, stored, partial(_is_same, place, headers), layout.file, where)
    if not problems and not any(header.entries for header in headers.values()):
        problems.append(Problem(f"{where}/{layout.file}", "holds no tensors", "save the model again"))
    return index, headers, problems


def _is_same(place: Place, headers: Mapping[str, Header], name: str, *files: str) -> bool:
    """Whether a tensor is the same in some files, as far as it can be read here."""
    found = [next(entry for entry in headers[file].entries if entry.name == name) for file in files]
    if not place.is_local or len({(entry.dtype, entry.shape) for entry in found}) > 1:
        return False
    pieces = (stream_spans(place.path / file, entry.spans) for file, entry in zip(files, found, strict=True))
    return all(len({*piece}) == 1 for piece in zip(*pieces, strict=True))


def _flax_in_safetensors(headers: Mapping[str, Header], where: str) -> list[Problem]:
    what = "holds a Flax model in a safetensors file, with names and orientations of its own"
    fix = "save the model with safe_serialization=False, or with its torch class"
    return [Problem(f"{where}/{n}", what, fix) for n, h in headers.items() if h.metadata.get("format") == "flax"]


def _read_header(folder: Folder, name: str, kind: str, where: str) -> Header:
    read = flax_files.read_header if kind == FLAX else safetensors_files.read_header
    with folder.open(name) as file:
        return read(file, f"{where}/{name}")


def _infos(
    headers: Mapping[str, Header], kind: str, root: Path, where: str, config: Mapping[str, Any]
) -> tuple[dict[str, TensorInfo], list[Problem]]:
    """Tensors by canonical name; two stored names with one meaning are a fault."""
    rows = [(name, entry) for name, header in headers.items() for entry in header.entries]
    torch_names = [from_flax_name(e.name) if kind == FLAX else e.name for _, e in rows]
    canonical = canonical_names(set(torch_names))
    if kind != FLAX:  # which keeps its kernels of that kind the other way round
        config = with_conv1d(config, {name: entry.shape for name, (_, entry) in zip(torch_names, rows, strict=True)})
    infos: dict[str, TensorInfo] = {}
    problems = []
    for (file, entry), torch_name in zip(rows, torch_names, strict=True):
        info = tensor_info(canonical[torch_name], entry, root / file, kind, config)
        if info.name in infos and entry.name != infos[info.name].stored_name:
            what = f"means the same tensor as {infos[info.name].stored_name}"
            problems.append(Problem(f"{where}/{file}", what, "keep one of the two", entry.name))
        infos.setdefault(info.name, info)
    return infos, problems


def tensor_info(name: str, entry: Entry, file: Path, kind: str, config: Mapping[str, Any]) -> TensorInfo:
    """A tensor by its canonical name, from its entry in a file of that kind and the model's config."""
    axes, as_stored = stored_axes(name, entry.shape, config), tuple(range(len(entry.shape)))
    if kind == FLAX:  # which turns the kernels of linear layers, and leaves as they are those that torch has turned
        axes = flax_axes(entry.name, len(axes)) if axes == as_stored else as_stored
    return TensorInfo(
        name=name,
        stored_name=entry.name,
        file=file,
        shape=tuple(entry.shape[axis] for axis in axes),
        dtype=entry.dtype,
        stored_shape=entry.shape,
        axes=axes,
        spans=entry.spans,
    )
