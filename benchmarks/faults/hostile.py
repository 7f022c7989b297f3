"""Files as strangers may make them, given to the real command line in this process, thousands of times."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.faults import models, mutations
from benchmarks.faults.mutations import Damage, Rng
from nufilt_jax.cli import main

MOST_SECONDS, MOST_BYTES = 2.0, 500_000_000  # of a refusal, beside what the process holds before
MOST_LINES, MOST_CHARACTERS = 12, 4000  # of one: a folder may have several faults, each in a line
_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_SUM = ("--method", "sum", "--quiet")

Command = tuple[str, ...]


class Target(NamedTuple):
    """A file to be damaged, how, and the commands that read it.

    Attributes:
      name: of the row in the results.
      file: relative to the sandbox.
      damage: to its bytes; None makes it lead elsewhere.
      commands: one is run.
    """

    name: str
    file: str
    damage: Damage | None
    commands: tuple[Command, ...]


class Outcome(NamedTuple):
    """What one command did: status, lines, processor seconds, bytes taken, and what is wrong; empty if nothing is."""

    status: int
    lines: list[str]
    seconds: float
    taken: int
    finding: str


def _json_damage(data: bytes, rng: Rng) -> bytes:
    return mutations.damaged_object(json.loads(data), rng)


def _any_text(_: bytes, rng: Rng) -> bytes:
    return rng.choice((b"", b"\0" * 99, rng.randbytes(999), b"[" * 99_999, "\u202e\x1b[2J".encode(), b"x" * 999_999))


def _targets() -> list[Target]:
    pairs = {kind: ("--base", kind, "--task", f"t={kind}-task") for kind in ("one", "shards", "flax")}
    model = {kind: (("plan", *given), ("merge", *given, "--out", "out", *_SUM)) for kind, given in pairs.items()}
    lora = (("plan", "--base", "one", "--task", "t=lora"),)
    done = (
        ("verify", "done", "--quick"),
        ("add", "done", "--task", "b=one-task", "--quiet"),
        ("export", "done", "--what", "forecast", "--out", "out"),
        ("export", "done", "--what", "delta", "--out", "out"),
        ("merge", *pairs["one"], "--out", "done", *_SUM),
    )
    bytes_, header = mutations.damaged_bytes, mutations.damaged_safetensors
    rows = [
        *[Target("safetensors: bytes", f"{at}/model.safetensors", bytes_, model["one"]) for at in ("one", "one-task")],
        *[Target("safetensors: header", f"{at}/model.safetensors", header, model["one"]) for at in ("one", "one-task")],
        Target("safetensors: names", "one-task/model.safetensors", mutations.renamed_safetensors, model["one"]),
        Target("safetensors: bombs", "one/model.safetensors", lambda _, rng: mutations.bomb(rng), model["one"]),
        Target("index", "shards/model.safetensors.index.json", _json_damage, model["shards"]),
        Target("links: shards", "shards/model-00001-of-00002.safetensors", None, model["shards"]),
        Target("links: side files", "one/tokenizer.json", None, model["one"]),
        Target("links: config", "one/config.json", None, model["one"]),
        *[Target("msgpack: bytes", f"{at}/flax_model.msgpack", bytes_, model["flax"]) for at in ("flax", "flax-task")],
        Target("config", "one/config.json", _json_damage, model["one"]),
        Target("config", "flax/config.json", _json_damage, model["flax"]),
        Target("tokenizer", "one/tokenizer.json", _any_text, model["one"]),
        Target("adapter config", "lora/adapter_config.json", _json_damage, lora),
        Target("adapter weights", "lora/adapter_model.safetensors", header, lora),
        Target("recipe", "done/nufilt.json", _json_damage, done),
        Target("forecast", "done/forecast.json", _json_damage, done),
        Target("state: window", "done/state/window-0000/window.json", _json_damage, done),
        Target("state: arrays", "done/state/window-0000/arrays.safetensors", bytes_, done),
        Target("state: arrays", "done/state/window-0000/arrays.safetensors", header, done),
    ]
    return rows


TARGETS = _targets()


class Sandbox:
    """A folder with sound models and a finished merge, of which one file at a time is damaged."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._sound = root / "sound"
        self._sound.mkdir(parents=True)
        (root / "outside").mkdir()
        (root / "outside" / "canary").write_text("nobody may touch this")
        base, task = models.base_and_task()
        for name, tensors in (("", base), ("-task", task)):
            models.write(self._sound / f"one{name}", tensors)
            models.write(self._sound / f"shards{name}", tensors, shards=2)
            models.write_flax(self._sound / f"flax{name}", tensors)
        models.write_lora(self._sound / "lora")
        with contextlib.chdir(self._sound), contextlib.redirect_stderr(io.StringIO()):
            done = ("merge", "--base", "one", "--task", "t=one-task", "--out", "done", *_SUM)
            if main(list(done)):
                raise SystemExit("the sound models cannot be merged")

    def run(self, target: Target, seed: int) -> Outcome:
        """Damages a file of a copy, runs one command on it, and looks at what that did."""
        rng = random.Random(f"{target.name} {target.file} {seed}")
        here = self.root / "here"
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(self._sound, here)
        # A recipe names its inputs by full paths.
        recipe = here / "done" / "nufilt.json"
        recipe.write_text(recipe.read_text().replace(str(self._sound), str(here)))
        path = here / target.file
        if target.damage is None:
            mutations.misled(path, self.root / "outside", rng)
        else:
            path.write_bytes(target.damage(path.read_bytes(), rng))
        outside = _snapshot(self.root, but="here")
        command = rng.choice(target.commands)
        with contextlib.chdir(here):
            outcome = _run(command)
        finding = outcome.finding or ("it wrote outside" if _snapshot(self.root, but="here") != outside else "")
        return outcome._replace(finding=f"{' '.join(command)}: {finding}" if finding else "")


def _run(command: Command) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    held = _memory("VmRSS")
    _forget_peak()
    start, finding, status = time.process_time(), "", 1
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(list(command))
        except BaseException as error:
            finding = f"{type(error).__name__} came through"
    seconds, taken = time.process_time() - start, max(0, _memory("VmHWM") - held)
    lines = err.getvalue().splitlines()
    return Outcome(
        status, lines, seconds, taken, finding or _fault(status, out.getvalue(), err.getvalue(), seconds, taken)
    )


def _fault(status: int, out: str, err: str, seconds: float, taken: int) -> str:
    """What is wrong with an outcome; empty if nothing is."""
    lines = err.splitlines()
    refusals = [line for line in lines if not line.startswith("nufilt: warning: ")]
    checks = {
        f"status {status}": status not in (0, 1),
        "a refusal without a line": status == 1 and not refusals,
        f"a line that is none of ours: {err[:300]!r}": any(not line.startswith("nufilt: ") for line in lines),
        f"not foreseen: {err[:300]!r}": "failed unforeseen" in err or "Traceback" in err,
        f"{len(lines)} lines": len(lines) > MOST_LINES,
        "a line without end": any(len(line) > MOST_CHARACTERS for line in lines),
        f"orders to a terminal: {err[:300]!r}": _UNPRINTABLE.search(out + err) is not None,
        f"{seconds:.1f} s": status == 1 and seconds > MOST_SECONDS,
        f"{taken / 1e6:.0f} MB": status == 1 and taken > MOST_BYTES,
    }
    return "; ".join(what for what, is_so in checks.items() if is_so)


def study(root: Path, n_cases: int, seed: int = 0) -> Iterator[tuple[Target, Outcome]]:
    """Runs so many cases, every target in turn."""
    sandbox = Sandbox(root)
    for number in range(n_cases):
        target = TARGETS[number % len(TARGETS)]
        yield target, sandbox.run(target, seed + number // len(TARGETS))


def _snapshot(root: Path, *, but: str) -> dict[str, tuple[int, int]]:
    found = {}
    for here, folders, names in os.walk(root):
        if here == str(root):
            folders.remove(but)
        for name in (*folders, *names):
            status = os.lstat(os.path.join(here, name))
            found[os.path.join(here, name)] = (status.st_mtime_ns, status.st_size)
    return found


def _memory(what: str) -> int:
    """Bytes that this process holds (VmRSS), or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
