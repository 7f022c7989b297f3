"""Files as strangers may make them, given to the real command line in this process, thousands of times.

Every case is another one: damage that gives the bytes of an earlier case for the same command is drawn again, and a
kind of damage that has no more of its own leaves its share to the others.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.common.records import ROOT
from benchmarks.faults import models, mutations
from benchmarks.faults.mutations import Damage, Rng
from nufilt_jax.cli import main

MOST_SECONDS, MOST_BYTES = 2.0, 500_000_000  # of a refusal, beside what the process holds before
MOST_LINES, MOST_CHARACTERS = 12, 4000  # of one: a folder may have several faults, each in a line
_DRAWS = 40  # of damage, until some of it is new
# By a small process: the peak of one that is started counts what its parent held then.
_MEASURING = """
import os, sys, time
start = time.monotonic()
silent = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=silent)
_, status, used = os.wait4(child, 0)
print(os.waitstatus_to_exitcode(status), time.monotonic() - start, used.ru_maxrss)
"""
_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_RECIPE = "done/nufilt.json"
_OUTPUTS = ("out", "done")  # what a command may write begins so
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


class Case(NamedTuple):
    """One damaged file and the command that reads it.

    Attributes:
      target: the file.
      command: without the program's name.
      content: its bytes; or where it leads, None making it a folder.
    """

    target: Target
    command: Command
    content: bytes | str | Path | None


class Outcome(NamedTuple):
    """What one command did.

    Attributes:
      status: of its exit.
      lines: on stderr.
      seconds: of the processor, in this process: Python's start and its imports are not in them.
      taken: bytes of memory at the peak, on top of what this process held before.
      finding: what is wrong; empty if nothing is.
    """

    status: int
    lines: list[str]
    seconds: float
    taken: int
    finding: str

    @property
    def refusals(self) -> list[str]:
        """The lines that are no warnings."""
        return [line for line in self.lines if not line.startswith("nufilt: warning: ")]


def _json_damage(data: bytes, rng: Rng) -> bytes:
    return mutations.damaged_object(json.loads(data), rng)


def _any_text(data: bytes, rng: Rng) -> bytes:
    if rng.random() < 0.5:
        return mutations.damaged_bytes(data, rng)
    return rng.choice((b"", b"\0" * 99, rng.randbytes(999), b"[" * 99_999, "\u202e\x1b[2J".encode(), b"x" * 999_999))


def _targets() -> list[Target]:
    pairs = {kind: ("--base", kind, "--task", f"t={kind}-task") for kind in ("one", "shards", "flax")}
    pairs |= {"coded": ("--base", "coded", "--task", "t=one-task"), "pickle": ("--base", "one", "--task", "t=pickled")}
    model = {kind: (("plan", *given), ("merge", *given, "--out", "out", *_SUM)) for kind, given in pairs.items()}
    lora = (("plan", "--base", "one", "--task", "t=lora"),)
    done = (
        ("verify", "done", "--quick"),
        ("add", "done", "--task", "b=one-task", "--quiet"),
        ("export", "done", "--what", "forecast", "--out", "out"),
        ("export", "done", "--what", "delta", "--out", "out"),
        ("merge", *pairs["one"], "--out", "done", *_SUM),
    )
    pickled = lambda _, rng: mutations.pickled(rng)  # noqa: E731
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
        Target("pickle alone", "pickled/pytorch_model.bin", pickled, model["pickle"]),
        Target("pickle and code beside", "coded/pytorch_model.bin", pickled, model["coded"]),
        Target("pickle and code beside", "coded/modeling_x.py", lambda _, rng: mutations.code(rng), model["coded"]),
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
        models.write_unsafe(self._sound / "pickled")
        models.write_unsafe(self._sound / "coded", base)
        with contextlib.chdir(self._sound), contextlib.redirect_stderr(io.StringIO()):
            done = ("merge", "--base", "one", "--task", "t=one-task", "--out", "done", *_SUM)
            if main(list(done)):
                raise SystemExit("the sound models cannot be merged")
        self._drawn: set[tuple[str, Command, bytes]] = set()
        for target in TARGETS:  # no damage is no case
            sound = hashlib.sha256(self._sound_bytes(target.file)).digest()
            self._drawn |= {(target.file, command, sound) for command in target.commands}

    def draw(self, target: Target, seed: int) -> Case | None:
        """A case that was not drawn before; None if there seems to be no more."""
        for attempt in range(_DRAWS):
            rng = random.Random(f"{target.name} {target.file} {seed} {attempt}")
            command = rng.choice(target.commands)
            if target.damage is None:
                content = rng.choice(mutations.leads(Path(target.file).name, self.root / "outside"))
                told = f"a link to {content}".encode()
            else:
                content = target.damage(self._sound_bytes(target.file), rng)
                told = content
            key = (target.file, command, hashlib.sha256(told).digest())
            if key not in self._drawn:
                self._drawn.add(key)
                return Case(target, command, content)
        return None

    def run(self, case: Case) -> Outcome:
        """Puts a damaged file into a copy of the sound models, runs the command, and looks at what that did."""
        with contextlib.chdir(self.prepared(case)):
            before = self._snapshot()
            outcome = _run(case.command)
        written = sorted(path for path, now in (self._snapshot() ^ before))
        if (self.root / "outside" / "executed").exists():
            (self.root / "outside" / "executed").unlink()
            outcome = outcome._replace(finding=f"it executed what it was given; {outcome.finding}")
        elif written:
            outcome = outcome._replace(finding=f"it wrote elsewhere: {written[0]}; {outcome.finding}")
        finding = f"{' '.join(case.command)}: {outcome.finding}" if outcome.finding else ""
        return outcome._replace(finding=finding)

    def prepared(self, case: Case) -> Path:
        """The folder in which the command of a case finds its damaged file."""
        here = self.root / "here"
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(self._sound, here)
        (here / _RECIPE).write_bytes(self._sound_bytes(_RECIPE))
        if case.target.damage is None:
            mutations.misled(here / case.target.file, case.content)  # pyright: ignore[reportArgumentType]
        else:
            (here / case.target.file).write_bytes(case.content)  # pyright: ignore[reportArgumentType]
        return here

    def _sound_bytes(self, file: str) -> bytes:
        data = (self._sound / file).read_bytes()
        # A recipe names its inputs by full paths.
        return data.replace(bytes(self._sound), bytes(self.root / "here")) if file == _RECIPE else data

    def _snapshot(self) -> set[tuple[str, tuple[int, ...]]]:
        """All files but those that a command may write, and what changes with them."""
        found = set()
        for here, folders, names in os.walk(self.root):
            if here == str(self.root / "here"):
                folders[:] = [name for name in folders if not name.startswith(_OUTPUTS)]
                names = [name for name in names if not name.startswith(_OUTPUTS)]
            for name in (*folders, *names):
                path = os.path.join(here, name)
                status = os.lstat(path)
                found.add((path, (status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode)))
        # Of this folder the outputs change the time.
        return {row for row in found if row[0] != str(self.root / "here")}


def measured(sandbox: Sandbox, case: Case) -> tuple[float, int]:
    """Seconds by the clock and bytes at the peak of a refusal by a process of its own.

    Raises:
      SystemExit: it is none.
    """
    command = [sys.executable, "-c", _MEASURING, sys.executable, "-m", "nufilt_jax.cli", *case.command]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    here = sandbox.prepared(case)
    told = subprocess.run(command, cwd=here, env=environment, stdout=subprocess.PIPE, check=True).stdout.split()
    if int(told[0]) != 1:
        raise SystemExit(f"{' '.join(case.command)} ended with status {int(told[0])} in a process of its own")
    return float(told[1]), int(told[2]) * 1024


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
    refusals = Outcome(status, lines, seconds, taken, "").refusals
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


def study(sandbox: Sandbox, n_cases: int, seed: int = 0) -> Iterator[tuple[Case, Outcome]]:
    """Runs so many cases, no two of them the same: every target in turn, as long as it has more."""
    left, n_run = list(TARGETS), 0
    while left and n_run < n_cases:
        for target in list(left):
            if n_run == n_cases:
                return
            if (case := sandbox.draw(target, seed + n_run)) is None:
                left.remove(target)
                continue
            n_run += 1
            yield case, sandbox.run(case)


def _memory(what: str) -> int:
    """Bytes that this process holds (VmRSS), or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
