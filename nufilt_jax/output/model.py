"""A model as a recipe names it: where it is, and what its files were; and how a place is spelt in a file."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from nufilt_jax.errors import Problem, shortened


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as the user names it, or as a recipe does.

    Attributes:
      name: the task's name; `base` for the base.
      source: folder or Hub id.
      revision: of a Hub id.
      sha256: of its weight files by name, as a recipe recorded them; None if it comes from the command line.
    """

    name: str
    source: str
    revision: str | None = None
    sha256: Mapping[str, str] | None = None

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], name: str | None = None) -> Self:
        """A model from its entry; the base's has no name."""
        return cls(name or entry["name"], str(entry["source"]), entry["revision"], dict(entry["sha256"]))

    def to_json(self) -> dict[str, Any]:
        """Its entry, without the name."""
        return {"source": self.source, "revision": self.revision, "sha256": dict(self.sha256 or {})}

    def moved(self, place: Callable[[str], str]) -> Self:
        """The same model, its source spelt otherwise."""
        return dataclasses.replace(self, source=place(self.source))

    def changes(self, now: Mapping[str, str], where: str, folder: Path | None = None) -> Iterable[Problem]:
        """Says that a model's files are not those that the merge in `folder` was begun with.

        Args:
          now: SHA-256 by file name, of the files as they are.
          where: the model.
          folder: where the recipe stands; None for that of a merge that is repeated.
        """
        then = self.sha256 or {}
        changed = sorted(name for name in {**then, **now} if then.get(name) != now.get(name))
        if changed:
            pairs = "; ".join(
                f"{shortened(name)} had SHA-256 {then.get(name)} and has {now.get(name)}" for name in changed
            )
            fix = "restore the files, or merge into another folder"
            since = f"the merge in {folder} began" if folder else "the merge that --config repeats"
            yield Problem(where, f"has changed since {since}: {pairs}", fix)


def seen_from(source: str, folder: Path) -> str:
    """A model's place as a file in `folder` names it: a Hub id as it is, a path relative to the folder.

    A path in the user's home is `~/...` where the folder lies outside, so that it names no user.

    >>> seen_from("/models/cars", Path("/models/merged")), seen_from("google/flan-t5-base", Path("/models"))
    ('../cars', 'google/flan-t5-base')
    """
    if not os.path.isabs(source):
        return source
    home, place = os.path.expanduser("~"), os.path.abspath(folder)
    if _is_in(source, home) and not _is_in(place, home):
        return os.path.join("~", os.path.relpath(source, home))
    relative, physical = os.path.relpath(source, place), os.path.realpath(place)
    if os.path.realpath(os.path.join(physical, relative)) != os.path.realpath(source):
        # A link is on the way to one of them: `..` leads out of what it points to.
        there = os.path.join(os.path.realpath(os.path.dirname(source)), os.path.basename(source))
        relative = os.path.relpath(there, physical)
    return relative if relative.startswith(os.pardir) else os.path.join(os.curdir, relative)


def found_from(source: str, folder: Path) -> str:
    """The inverse of `seen_from`: a full path, or a Hub id.

    Earlier versions wrote paths as seen from the folder as it was spelt, links and all.
    """
    if not source.startswith(("~", os.curdir)):  # no id of the Hub begins so
        return source
    places = os.path.abspath(folder), os.path.realpath(folder)
    spelt, physical = (os.path.normpath(os.path.join(place, os.path.expanduser(source))) for place in places)
    is_other = os.path.exists(physical) and os.path.realpath(physical) != os.path.realpath(spelt)
    return physical if is_other else spelt


def _is_in(path: str, folder: str) -> bool:
    return os.path.isabs(folder) and folder != os.sep and os.path.commonpath([path, folder]) == os.path.normpath(folder)
