"""Damage to files, drawn by seed: to their bytes, to the JSON in them, and to what their names lead to."""

import copy
import io
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = (
    "w\x1b[31m\x1b[2J",
    "\u202egnp.thgiew",
    "two\nlines\r\n\tand a tab",
    "\x00zero",
    "\x9b31m\x07",
    "n" * 65536,
    "../../outside/canary",
    "/etc/passwd",
    "C:\\windows\\w",
    "model.layers.0.self_attn.q_proj.weight\u2028nufilt: done",
    "[bold red]w[/]",
    "",
    ".",
    "a/b/c",
    "%s%n{0}{}",
    "\ud800half",
)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**53,
        2**63,
        2**64,
        10**30,
        10**400,
        0.5,
        -0.0,
        1e308,
        float("inf"),
        float("nan"),
    ),
    *("", "F32", "F4", "float32", "eval(1)", "1e999", {}, [], [[]], [None], [-1], [2**62, 2**62], [0, 2**63], {"": {}}),
    *NAMES,
)
EXECUTED = b"../outside/executed"  # what exists once a stranger's code has run, as seen from where commands run
_DEPTHS = (60, 120, 900, 1100, 20_000, 200_000)

Rng = random.Random


def damaged_bytes(data: bytes, rng: Rng) -> bytes:
    """Some bytes changed, cut out, doubled or put in; more often near the start, where files tell of themselves."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(min(len(data), rng.choice((16, 256, 4096, 1 << 20))) + 1) if data else 0
        n = rng.choice((1, 1, 2, 4, 8, 64))
        piece = rng.choice((rng.randbytes(n), b"\xff" * n, b"\0" * n, data[at : at + n] * 2, b"{" * n, b'"'))
        data = data[:at] + rng.choice((piece, b"")) + data[at + rng.choice((0, n)) :]
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data) + 1)]
    return data


def damaged_object(content: Any, rng: Rng) -> bytes:
    """JSON of an object in which something stands that should not, or something is missing; or that is no JSON."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _damage(content, rng)
    text = json.dumps(content)
    kind = rng.random()
    if kind < 0.06:
        depth, opening = rng.choice(_DEPTHS), rng.choice(("[", '{"a":'))
        closing = "]" if opening == "[" else "}"
        nested = opening * depth + rng.choice(("", "1" + closing * depth))
        return text.replace(rng.choice(('"', "1", "{")), nested, 1).encode(errors="replace")
    if kind < 0.1:  # a key twice
        return text.replace("{", '{"weight_map": {}, "weight_map": 1, ', 1).encode(errors="replace")
    if kind < 0.14:
        return rng.choice(
            (b"", b"null", b"[]", b"3", b'"x"', b"\xff\xfe{\0}\0", b"{" + b" " * 100_000, b"\xef\xbb\xbf{}")
        )
    if kind < 0.2:
        return damaged_bytes(text.encode(errors="replace"), rng)
    return text.encode(errors="replace")


def _damage(content: Any, rng: Rng) -> None:
    """Changes one thing, somewhere inside."""
    here = content
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here))) if isinstance(here, list) else []
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(here[key], (dict, list)) and here[key] and rng.random() < 0.7:
            here = here[key]
            continue
        kind = rng.random()
        if kind < 0.6:
            here[key] = copy.deepcopy(rng.choice(VALUES))  # which is damaged next, perhaps
        elif kind < 0.75 or not isinstance(here, dict):
            del here[key]
        else:
            here[rng.choice(NAMES)] = here.pop(key)
        return


def damaged_safetensors(data: bytes, rng: Rng) -> bytes:
    """A safetensors file whose header was damaged as JSON, with or without the length that it then has."""
    length = int.from_bytes(data[:8], "little")
    header = damaged_object(json.loads(data[8 : 8 + length]), rng)
    told = rng.choice((len(header), len(header), len(header), length, 2**63, 2**64 - 1, 10**8, 0))
    return told.to_bytes(8, "little") + header + data[8 + length :]


def renamed_safetensors(data: bytes, rng: Rng) -> bytes:
    """A sound safetensors file in which one tensor has another name."""
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    old = rng.choice([name for name in table if name != "__metadata__"])
    name = rng.choice(NAMES)
    table = {name if key == old else key: row for key, row in table.items()}
    header = json.dumps(table).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def bomb(rng: Rng) -> bytes:
    """A header that is small on disk, and large once it is read: many values, a long text, or a length alone."""
    n = rng.choice((10_000, 100_000, 1_000_000, 5_000_000, 20_000_000))
    inside = rng.choice(
        (
            b'{"a":[' + b"[]," * n + b"[]]}",
            b'{"a":"' + b"\xf0\x9f\x98\x80" * (n // 4) + b'"}',
            b'{"a":' + b"1" * n + b"}",
            b"{" + b",".join(b'"%d":{}' % k for k in range(min(n, 300_000))) + b"}",
            b"[" * n,
        )
    )
    return len(inside).to_bytes(8, "little") + inside


def pickled(rng: Rng) -> bytes:
    """Weights as pickle writes them, which make a file for whoever unpickles them; by hand, and never read here."""
    order = rng.choice(
        (
            b"cos\nsystem\n(S'touch %s'\ntR." % EXECUTED,
            b"cposix\nsystem\n(S'touch %s'\ntR." % EXECUTED,
            b'cbuiltins\nexec\n(S\'open("%s", "w").close()\'\ntR.' % EXECUTED,
            b'cbuiltins\neval\n(S\'open("%s", "w").close()\'\ntR.' % EXECUTED,
            b"(S'touch %s'\nios\nsystem\n." % EXECUTED,
        )
    )
    version = rng.choice((b"", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
    before = b"".join(b"S'%d'\n0" % rng.randrange(10**6) for _ in range(rng.randrange(4)))  # is read, and dropped
    content = version + before + order + rng.randbytes(rng.choice((0, 0, 8, 999)))
    if rng.random() < 0.5:
        return content
    packed = io.BytesIO()  # as torch has done since 1.6
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return packed.getvalue()


def code(rng: Rng) -> bytes:
    """Code such as a configuration's `auto_map` names, which makes a file for whoever imports it."""
    path = EXECUTED.decode()
    opened = f'open("{path}", "w").close()'
    orders = (opened, f'import os\nos.system("touch {path}")', f"exec('{opened}')")
    order = rng.choice(orders)
    return f"# {rng.randrange(10**9)}\n{order}\n\n\nclass Model:\n    pass\n".encode()


def leads(name: str, outside: Path) -> tuple[Path | str | None, ...]:
    """Where a link in a file's place may lead: to nothing, to itself, to a folder, to files; None is for a folder."""
    canary, above = outside / "canary", os.path.relpath(outside / "canary", outside.parent / "here" / "model")
    files = (canary, above, f"{name}/x", "/dev/null", "/proc/self/mem")
    return (outside / "missing", name, outside, "..", "/", *files, None)


def misled(path: Path, to: Path | str | None) -> None:
    """Puts a link, or a folder, in the place of a file."""
    path.unlink()
    if to is None:
        path.mkdir()
    else:
        path.symlink_to(to)


Damage = Callable[[bytes, Rng], bytes]
