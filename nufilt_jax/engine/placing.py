"""Whether a merge can be written where it is asked for, told without writing anything."""

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from nufilt_jax.checkpoints.writer import output_error
from nufilt_jax.engine.grid import Window
from nufilt_jax.errors import Problem
from nufilt_jax.output.place import RECIPE, OutputPlace
from nufilt_jax.output.state import room_problems


def place_problems(place: OutputPlace, rows: Iterable[Window], n_tasks: int) -> Iterator[Problem]:
    """What a merge meets as soon as it locks its place, or keeps its largest window.

    Args:
      place: of the output.
      rows: the windows of the grid; none where these are refused themselves.
      n_tasks: number of all tasks; a window that has them all is not kept again.
    """
    # The folders above an output may be the merge's to make.
    there = next(folder for folder in place.out.parents if os.path.exists(folder))
    if code := _refusing(there):
        yield from output_error(place.out, OSError(code, os.strerror(code), str(there))).problems
        return
    yield from place.foreign()
    if largest := max((row.n_bytes for row in rows if row.done < n_tasks), default=0):
        is_recorded = (place.partial / RECIPE).exists()
        with contextlib.suppress(OSError):  # a disk that tells nothing
            yield from room_problems(there, largest, _size(place.staging if is_recorded else place.partial))


def _refusing(folder: Path) -> int:
    """The error with which nothing can be made in a folder; 0 if there is none that could be told before."""
    if not folder.is_dir():
        return errno.ENOTDIR
    if os.access(folder, os.W_OK | os.X_OK):
        return 0
    return errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES


def _size(folder: Path) -> int:
    """Bytes of the files of a killed run, which the next one removes."""
    return sum(os.lstat(os.path.join(here, name)).st_size for here, _, names in os.walk(folder) for name in names)
