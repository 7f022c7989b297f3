"""The index of a sharded model: which tensor is in which file."""

from collections.abc import Callable, Collection, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from nufilt_jax.anatomy import Shape, is_buffer
from nufilt_jax.errors import Problem
from nufilt_jax.strict_json import JsonError, is_text, parse_object, shown

_RELOAD = "download or save the model again"


class Index(NamedTuple):
    """`shards`: file name -> names of its tensors; `metadata`: as it stands in the file."""

    shards: Mapping[str, frozenset[str]]
    metadata: Mapping[str, Any]
    problems: tuple[Problem, ...]


def parse_index(text: bytes, where: str) -> Index:
    """Reads an index file; paths that lead out of the folder are refused."""
    try:
        content = parse_object(text)
    except JsonError as error:
        return Index({}, {}, (Problem(where, str(error), error.fix or _RELOAD),))
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict):
        return Index({}, {}, (Problem(where, "is no index: expected JSON with a weight_map", _RELOAD),))
    shards: dict[str, set[str]] = {}
    problems = []
    for tensor, shard in sorted(weight_map.items(), key=lambda row: row[0]):
        if _stays_inside(shard):
            shards.setdefault(shard, set()).add(tensor)
        else:
            what = f"is said to be in {shown(shard)}, which is not a file of this folder"
            problems.append(Problem(where, what, "get the model from a source you trust", tensor))
    metadata = content.get("metadata")
    frozen = {shard: frozenset(tensors) for shard, tensors in shards.items()}
    return Index(frozen, metadata if isinstance(metadata, dict) else {}, tuple(problems))


def _stays_inside(shard: object) -> bool:
    if not isinstance(shard, str) or not shard or not is_text(shard) or "\0" in shard or "\\" in shard:
        return False
    path = PurePosixPath(shard)
    return not path.is_absolute() and not PureWindowsPath(shard).drive and ".." not in path.parts


def missing_shards(index: Index, present: Collection[str], where: str) -> list[Problem]:
    """One problem per file that the index names and the folder lacks."""
    return [
        Problem(f"{where}/{shard}", f"is missing; the index puts {len(tensors)} tensors there", _RELOAD)
        for shard, tensors in index.shards.items()
        if shard not in present
    ]


def disagreements(
    index: Index,
    stored: Mapping[str, Mapping[str, Shape]],
    is_same: Callable[[str, str, str], bool],
    index_where: str,
    where: str,
) -> list[Problem]:
    """Tensors that the index and the shards place differently; computed buffers may be in no index.

    Of copies in two shards the first is read, if they are equal.

    Args:
      index: a sound index.
      stored: file name -> names and shapes of the tensors that are really there.
      is_same: whether a tensor is the same in two of the files.
      index_where: what to call the index in messages.
      where: what to call the folder.
    """
    problems = []
    seen: dict[str, str] = {}
    for shard, names in stored.items():
        found, promised = frozenset(names), index.shards[shard]
        for name in sorted(promised - found):
            problems.append(Problem(f"{where}/{shard}", "is missing; the index puts it there", _RELOAD, name))
        for name in sorted(found - promised):
            is_named = is_buffer(name, names[name]) or any(name in known for known in index.shards.values())
            if name not in seen and not is_named:
                problems.append(Problem(f"{where}/{shard}", f"is not in {index_where}", _RELOAD, name))
        for name in sorted(found):
            if name in seen and not is_same(name, seen[name], shard):
                what = f"is stored a second time; it is in {seen[name]} too"
                problems.append(Problem(f"{where}/{shard}", what, _RELOAD, name))
            seen.setdefault(name, shard)
    return problems
