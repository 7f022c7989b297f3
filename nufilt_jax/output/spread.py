"""State that is spread over several processes: an orbax checkpoint, in which each writes and reads its own part."""

import contextlib
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nufilt_jax.checkpoints.dtypes import AnyArray, NumpyArray
from nufilt_jax.errors import OutputError, Problem
from nufilt_jax.output.arrays import Groups

_PLAIN = re.compile(r"[\w/.-]+", re.ASCII)


def is_spread(array: AnyArray) -> bool:
    """Whether this process holds a part of an array alone."""
    return not getattr(array, "is_fully_addressable", True)


class _Lent(np.ndarray):
    """A view that orbax writes from: it would copy the whole state first, lest somebody change it meanwhile."""

    def __deepcopy__(self, memo: dict[int, Any] | None = None, /) -> "_Lent":
        return self


def save_spread(folder: Path, groups: Groups) -> None:
    """Writes arrays, each process its own part.

    Raises:
      OutputError: the folder cannot be written.
    """
    import orbax.checkpoint as ocp

    lent = {
        group: {name: x if is_spread(x) else np.asarray(x).view(_Lent) for name, x in named.items()}
        for group, named in groups.items()
    }
    try:
        # Not compressed: float32 task vectors hardly shrink, and the processor is busy merging.
        handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
        with quiet(), spelt_plainly(folder) as path, ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, lent)
    except (OSError, ValueError, RuntimeError) as error:
        what = f"the state cannot be written: {error}"
        raise OutputError(Problem(str(folder), what, "free some space and run the same command again")) from error


class SpreadArrays:
    """Arrays that `save_spread` has written; each is read when it is asked for. A context."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._readers = folder, contextlib.ExitStack()

    def __enter__(self) -> "SpreadArrays":
        import orbax.checkpoint as ocp

        self._readers.enter_context(quiet())
        self._checkpointer = self._readers.enter_context(ocp.Checkpointer(ocp.PyTreeCheckpointHandler()))
        return self

    def __exit__(self, *_: object) -> None:
        self._readers.close()

    @property
    def names(self) -> dict[str, list[str]]:
        """The names of each group.

        Raises:
          ValueError: they are not told any more.
        """
        with spelt_plainly(self._folder) as path:
            told: Any = self._checkpointer.metadata(path).item_metadata
        if told is None:  # orbax says no more than that
            raise ValueError("its metadata is not there or damaged")
        tree: Any = told.tree
        return {group: list(named) for group, named in tree.items()}

    def read(self, group: str, names: Iterable[str]) -> dict[str, NumpyArray]:
        """Some arrays of a group, and nothing else read.

        Raises:
          OSError, ValueError, KeyError or RuntimeError: the checkpoint is damaged.
        """
        import orbax.checkpoint as ocp

        wanted = list(names)
        how: Mapping[str, Any] = {group: dict.fromkeys(wanted, ocp.RestoreArgs(restore_type=np.ndarray))}
        part = ocp.args.PyTreeRestore(item={group: dict.fromkeys(wanted, 0)}, restore_args=how, partial_restore=True)
        with spelt_plainly(self._folder) as path:
            return self._checkpointer.restore(path, args=part)[group]


@contextlib.contextmanager
def spelt_plainly(folder: Path) -> Iterator[Path]:
    """A path that orbax takes as it is: it knows UTF-8 alone, and reads a pattern or an address into some names."""
    path = folder.absolute()
    if _PLAIN.fullmatch(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="nufilt-") as scratch:
        link = Path(scratch) / "folder"
        link.symlink_to(path.parent)  # not to the folder itself, which need not be there yet
        yield link / path.name


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the tracebacks of orbax's threads off stderr; the failure itself is raised, and told in one line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
