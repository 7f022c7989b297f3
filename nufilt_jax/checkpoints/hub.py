"""Where a checkpoint is: a local folder, the Hub's local cache, or the Hub.

huggingface_hub is imported only when a source is no local folder: it is slow to start.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any

from nufilt_jax.checkpoints.beside import files_beside, is_wanted_of_task
from nufilt_jax.checkpoints.folders import (
    ADDED,
    Folder,
    Layout,
    LocalFolder,
    find_weights,
    no_weights_problem,
)
from nufilt_jax.checkpoints.hub_failures import UnreachableError, distinguished, hushed, translated
from nufilt_jax.checkpoints.index import parse_index
from nufilt_jax.durable import atomic_write
from nufilt_jax.errors import CheckpointError, Problem
from nufilt_jax.strict_json import MOST_BYTES

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$", re.ASCII)
_ADDRESS = re.compile(
    r"(?!.*(\.\.|--))(https?://[^/]+/|hf://|(www\.)?(huggingface\.co|hf\.co)/)?(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(/(tree|blob|resolve)/(?P<revision>[^/]+)(/.*)?)?/?$",
    re.ASCII,
)
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_PATTERN = re.compile(r"[*?\[]")  # what the Hub library would take for more than a name
_TIMEOUT = 10.0  # seconds for the first answer of the Hub
_BLOCK = 1 << 18  # bytes per request when only headers are fetched


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder that was found: how to read it, its path, and its commit if it came from the Hub."""

    folder: Folder
    path: Path
    revision: str | None
    is_local: bool = True


def parse_source(text: str) -> tuple[str, str | None]:
    """Splits `PATH_OR_HUB[@REV]`; an existing path that contains `@` is taken whole.

    >>> parse_source("google/flan-t5-base@refs/pr/4")
    ('google/flan-t5-base', 'refs/pr/4')
    """
    name, at, revision = text.rpartition("@")
    if not at or not name or not revision or os.path.exists(os.path.expanduser(text)):
        return text, None
    return name, revision


def locate(source: str, *, revision: str | None, offline: bool, headers_only: bool, whole: bool = True) -> Place:
    """Finds a checkpoint, downloading it if it must.

    Args:
      source: a folder or a Hub id.
      revision: of a Hub id.
      offline: use the local Hub cache alone.
      headers_only: write nothing.
      whole: whether everything that belongs to the model is needed, or what its weights mean.

    Raises:
      CheckpointError: there is no such folder, and the Hub cannot or may not give it.
    """
    path = Path(os.path.expanduser(source))  # pathlib's raises where there is no such user
    if os.path.isdir(path) and source:
        if revision is not None:
            what = f"is a local folder, which has no revision {revision!r}"
            raise CheckpointError(Problem(source, what, "leave out the part after @"))
        return Place(LocalFolder(path), path, None)
    if os.path.exists(path) and source:
        raise CheckpointError(Problem(source, "is a file", f"give its folder: {path.parent}"))
    if not _HUB_ID.match(source) or ".." in source or "--" in source:
        raise CheckpointError(Problem(source, "there is no such folder", f"check the path{_meant(source)}"))
    return _locate_on_hub(source, revision, offline=offline, headers_only=headers_only, whole=whole)


def _meant(source: str) -> str:
    """Tells the Hub id that an address of a model's page, or an id with a slash behind it, may mean."""
    found = _ADDRESS.match(source)
    if not found:
        return ""
    return f", or for a model of the Hub give {found['id']}" + (f"@{found['revision']}" if found["revision"] else "")


def _locate_on_hub(source: str, revision: str | None, *, offline: bool, headers_only: bool, whole: bool) -> Place:
    from huggingface_hub import constants

    cached = _cached(source, revision or constants.DEFAULT_REVISION)
    if offline or constants.HF_HUB_OFFLINE:
        if cached is None:
            at = f" at revision {revision!r}" if revision else ""
            what = f"there is no such folder, and the local Hub cache does not hold it{at}"
            raise CheckpointError(Problem(source, what, "check the path, or run once without --offline"))
        return cached
    # Of a whole model the cache may hold less, as a program fetched it that needed less: only the Hub knows.
    is_fixed = headers_only or (not whole and _COMMIT.match(revision or ""))
    if cached is not None and is_fixed and _is_complete(cached.folder):
        return cached
    try:
        with distinguished(source, revision), hushed():
            return _fetch(source, revision, headers_only=headers_only, whole=whole)
    except UnreachableError as error:
        if cached is not None and _is_complete(cached.folder):
            return cached
        raise CheckpointError(*error.problems) from None


def _cached(source: str, revision: str) -> Place | None:
    """The cache's snapshot of a revision: `refs/REVISION` holds a commit, `snapshots/COMMIT` the files."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}"
    ref = root / "refs" / revision
    commit = ref.read_text().strip() if os.path.isfile(ref) else revision  # False where pathlib's may raise
    snapshot = root / "snapshots" / commit
    if not _COMMIT.match(commit) or not os.path.isdir(snapshot):
        return None
    return Place(LocalFolder(snapshot), snapshot, commit)


def _is_complete(folder: Folder) -> bool:
    """Whether all weights that the folder speaks of are in it."""
    layout = find_weights(folder.files())
    return layout is not None and all(folder.has(name) for name in _weight_names(folder, layout))


def _weight_names(folder: Folder, layout: Layout) -> list[str]:
    if not layout.is_index:
        return [layout.file]
    with folder.open(layout.file) as file:
        return [layout.file, *parse_index(file.read(MOST_BYTES + 1), layout.file).shards]


def _fetch(source: str, revision: str | None, *, headers_only: bool, whole: bool) -> Place:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(source, revision=revision, timeout=_TIMEOUT, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    layout = find_weights(sizes)
    if layout is None:  # said before anything is downloaded
        raise CheckpointError(no_weights_problem(source, sizes))
    remote = HubFolder(source, info.sha or "main", sizes)
    if headers_only:
        return Place(remote, Path(source), info.sha, is_local=False)
    beside = files_beside(sizes) if whole else filter(is_wanted_of_task, sizes)
    wanted = {*_weight_names(remote, layout), *beside, ADDED} & sizes.keys()
    patterns = [_PATTERN.sub(r"[\g<0>]", name) for name in wanted]
    path = Path(snapshot_download(source, revision=info.sha, allow_patterns=patterns))
    _remember(path, revision, info.sha)
    return Place(LocalFolder(path), path, info.sha)


def _remember(snapshot: Path, revision: str | None, commit: str | None) -> None:
    """Notes which commit a branch meant, as the Hub library does, so that `--offline` finds it by name."""
    from huggingface_hub import constants

    name = revision or constants.DEFAULT_REVISION
    if commit is not None and not _COMMIT.match(name):
        ref = snapshot.parent.parent / "refs" / name
        ref.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(ref, commit.encode())  # half a commit would be none, and runs beside this one read it


@dataclasses.dataclass(frozen=True)
class HubFolder:
    """A Hub repository at one commit, read in ranges and never written to disk.

    Attributes:
      source: the Hub id.
      commit: its hash.
      sizes: bytes of every file.
    """

    source: str
    commit: str
    sizes: Mapping[str, int]

    def files(self) -> list[str]:
        """Names of the repository's files."""
        return sorted(self.sizes)

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return name in self.sizes

    def open(self, name: str) -> BufferedReader:
        """Opens a file; its bytes are fetched where they are read."""
        return BufferedReader(_HubFile(self, name), buffer_size=_BLOCK)

    def fetch(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a file."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.source, name, revision=self.commit)
        # Not compressed: a range would be one of the compressed bytes.
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with translated(self.source, self.commit), hushed():
            response = get_session().get(url, headers=headers, timeout=_TIMEOUT)
            hf_raise_for_status(response)
            whole = response.status_code == 200  # a server may ignore the range
            return response.content[start:stop] if whole else response.content


class _HubFile(RawIOBase):
    """A seekable remote file."""

    def __init__(self, folder: HubFolder, name: str) -> None:
        super().__init__()
        self._folder, self._name, self._at = folder, name, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = offset + (0, self._at, self._folder.sizes[self._name])[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        stop = min(self._at + len(buffer), self._folder.sizes[self._name])
        if stop <= self._at:
            return 0
        data = self._folder.fetch(self._name, self._at, stop)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
