"""Regular expressions out of a stranger's file, matched with names in a time that has an end.

Matching can take longer than the universe is old, in C code that nothing in its own process stops. Anything but a plain
name is therefore matched in a process of its own, which is ended when its time is over.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

_SECONDS = 2.0
_BYTES = 1 << 30  # address space of the process: repetitions of repetitions can take any amount
_PLAIN = re.compile(r"[\w-]+((\\)?\.[\w-]+)*")
_PROGRAM = f"""
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({_BYTES}, {_BYTES}))
except (ImportError, ValueError, OSError):
    pass
forms, names = json.load(sys.stdin)
json.dump([[(f := re.fullmatch(x, n)) and f.groupdict().get("idx", "") for n in names] for x in forms], sys.stdout)
"""


class EndlessError(ValueError):
    """The expressions take too long, or too much memory."""


def matched(
    expressions: Iterable[str], names: Sequence[str], *, at_the_end: bool = False
) -> Mapping[str, Mapping[str, str]]:
    r"""The names that each expression matches as a whole, each with what the group `idx` holds there.

    Args:
      expressions: valid ones, as Python's `re` takes them.
      names: of modules.
      at_the_end: take what follows any of a name's dots as a whole, too.

    Raises:
      EndlessError: they are no honest ones.

    >>> matched([r".*\.(?P<idx>\d)\.fc", "fc1"], ["a.0.fc", "a.fc1"], at_the_end=True)
    {'fc1': {'a.fc1': ''}, '.*\\.(?P<idx>\\d)\\.fc': {'a.0.fc': '0'}}
    """
    forms = {x: rf"(?:.*\.)?(?:{x})" if at_the_end else x for x in expressions}
    found = {x: {n: "" for n in names if re.fullmatch(form, n)} for x, form in forms.items() if _PLAIN.fullmatch(x)}
    others = [x for x in forms if x not in found]
    told = _apart([forms[x] for x in others], names) if others and names else [[None] * len(names)] * len(others)
    for x, groups in zip(others, told, strict=True):
        found[x] = {n: group or "" for n, group in zip(names, groups, strict=True) if group is not None}
    return found


def _apart(forms: Sequence[str], names: Sequence[str]) -> list[list[str | None]]:
    """Of every form and name the group, in another process."""
    command, given = [sys.executable, "-I", "-S", "-c", _PROGRAM], json.dumps([forms, list(names)])
    try:
        told = subprocess.run(command, input=given, capture_output=True, check=True, text=True, timeout=_SECONDS)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise EndlessError from error
    return json.loads(told.stdout)
