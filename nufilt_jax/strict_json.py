"""JSON read as the work of strangers: what is wrong with it is said, and no text breaks the reader."""

import json
import math
from collections import Counter
from typing import Any, BinaryIO

LFS_POINTER = "is a Git LFS pointer, not the file itself"
LFS_PULL = "run in the clone: git lfs pull"
POINTER_BYTES = 100  # that tell one

_LFS_START = b"version https://git-lfs.github.com/spec/"
_MAX_DEPTH = 100  # of brackets in brackets: configs have 5, and what walks them later recurses
_MAX_DIGITS = 308  # of a whole number: a float holds no more
# The largest models have some 100 000 tensors, of 130 bytes and ten values each in a header. Above, a small file takes
# much memory: that of 48 MB of JSON is at most half a gigabyte.
MOST_BYTES = 48_000_000
_MOST_VALUES = 2_500_000
_SHOWN = 80  # characters of a value in a message


class JsonError(ValueError):
    """A text is not the JSON object that was expected; says in which way, to follow the file's name.

    Attributes:
      fix: what to do about it; empty if that depends on the file.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.fix = fix


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that begins so stands for one that a clone without git-lfs did not fetch."""
    return start.startswith(_LFS_START)


def read_object(file: BinaryIO, *, lenient: bool = False) -> dict[str, Any]:
    """Reads a JSON object from an open file, and of one that is too long not all; see `parse_object`."""
    return parse_object(file.read(MOST_BYTES + 1), lenient=lenient)


def parse_object(text: bytes, *, lenient: bool = False) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      text: the file's content, in UTF-8.
      lenient: take NaN, Infinity and repeated keys as Python and transformers do; some models' configs have them.

    Raises:
      JsonError: it is none, is nested too deeply, or has numbers that nothing can hold.
    """
    if is_lfs_pointer(text):
        raise JsonError(LFS_POINTER, LFS_PULL)
    if len(text) > MOST_BYTES:
        raise JsonError(f"is JSON of more than {MOST_BYTES // 1_000_000} MB")
    if sum(map(text.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise JsonError(f"is JSON of more than {_MOST_VALUES} values")
    strict: dict[str, Any] = {} if lenient else _STRICT
    try:
        content = json.loads(text.decode("utf-8-sig"), parse_int=_whole, **strict)
    except JsonError:
        raise
    except RecursionError:
        raise JsonError("is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise JsonError(f"is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise JsonError("is not a JSON object")
    if _depth_exceeds(content, _MAX_DEPTH):
        raise JsonError("is nested too deeply")
    return content


def shown(value: object) -> str:
    """A value as messages quote it: whatever a file holds, not its whole length."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def is_text(name: str) -> bool:
    """Whether a name can be written to a file in UTF-8; JSON's escapes can spell halves of characters, which cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise JsonError(f"has a number of {len(digits)} digits")
    return int(digits)


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise JsonError(f"has the number {text[:_SHOWN]}, which is too large")
    return value


def _constant(name: str) -> float:
    raise JsonError(f"has the number {name}, which JSON does not know")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise JsonError(f"has the key {shown(twice)} twice")
    return content


_STRICT = {
    "parse_float": _number,
    "parse_constant": _constant,
    "object_pairs_hook": _pairs,
}


def _depth_exceeds(content: object, limit: int) -> bool:
    """Level by level: a walk that recursed would fall into the same hole."""
    level = [content]
    for _ in range(limit):
        level = [child for item in level for child in _children(item)]
        if not level:
            return False
    return True


def _children(item: object) -> list[object]:
    if isinstance(item, dict):
        return [*item.values()]
    return item if isinstance(item, list) else []
