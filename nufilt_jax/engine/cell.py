"""One cell of the grid: a window's part of a task is read, and merged by the rule for these layers."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax

from nufilt_jax import methods
from nufilt_jax.anatomy import tensor_of
from nufilt_jax.checkpoints import Checkpoint
from nufilt_jax.checkpoints.tensors import PassingTensors
from nufilt_jax.engine.ahead import CompileAhead
from nufilt_jax.engine.devices import mesh_of
from nufilt_jax.engine.factors import task_rank, window_ranks, zeros_of
from nufilt_jax.engine.grid import Window
from nufilt_jax.engine.hosts import Hosts
from nufilt_jax.engine.plan import Plan
from nufilt_jax.engine.timing import Clock, CompileLog
from nufilt_jax.engine.unchanged import HashedFiles
from nufilt_jax.engine.watching import Watcher
from nufilt_jax.errors import NufiltError, Problem
from nufilt_jax.methods.adaptation import LearningConfig
from nufilt_jax.methods.selection import Selection
from nufilt_jax.methods.stacked import TaskVector, task_vector
from nufilt_jax.methods.state import MergeState, Numbers
from nufilt_jax.output.hashes import file_sha256


class TaskAtHand(NamedTuple):
    """A task that is ready to be merged into a window, and the time that reading it took."""

    name: str
    checkpoint: Checkpoint
    vector: TaskVector
    clock: Clock


def rule_of(plan: Plan, window: Window) -> methods.Merger:
    """The rule for the layers of a window alone."""
    settings = plan.settings
    layers = tuple(name for stack in window.stacks if stack.is_solved for name in stack.layers)
    others = tuple(name for stack in window.stacks if not stack.is_solved for name in stack.layers)
    return methods.get(
        settings.method,
        settings.config,
        seed=settings.seed,
        layers=settings.layers,
        other_params=settings.other_params,
        conv=settings.conv,
        selection=Selection(layers, others),
        mesh=mesh_of(plan.devices, settings.method),
        ranks=window_ranks(window.stacks),
    )


def load_task(plan: Plan, window: Window, name: str, files: HashedFiles, stop: threading.Event) -> TaskAtHand:
    """Forms a task vector on the device, tensor by tensor from the mapped base and the task's files.

    Args:
      plan: of the merge.
      window: whose layers are read.
      name: of the task.
      files: what was hashed, with which what is read must agree.
      stop: once it is set, reading ends with `CancelledError`.

    Raises:
      ChangedError: it does not.
    """
    checkpoint, clock, names = plan.tasks[name], Clock(), touched(window)
    theirs = checkpoint.unread(names, stop=stop)
    with files.required(plan.base, checkpoint):
        with clock.spent_on("read"):
            base = PassingTensors(plan.base.read(names))
            ranks = _ranks(plan, window, name)
            vector = task_vector(base, theirs, tuple(stack.layers for stack in window.stacks), ranks)
        with clock.spent_on("put"):
            jax.block_until_ready(vector.stacks)  # copies run on by themselves: else the solve would pay for them
    return TaskAtHand(name, checkpoint, vector, clock)


def _ranks(plan: Plan, window: Window, name: str) -> list[int | None]:
    """Of each stack, the rank in which τ of a task is formed; None for a dense one."""
    number = [source.name for source in plan.sources].index(name)
    thin = methods.find(plan.settings.method).in_factors
    return [task_rank(stack, number, plan.tasks[name], in_factors=thin) for stack in window.stacks]


def compiled_ahead(plan: Plan, hosts: Hosts) -> CompileAhead | None:
    """Begins to compile what the first solve of a run needs; None where there is none, or more devices than one."""
    window = next((row for row in plan.rows if row.done < len(plan.sources)), None)
    number = max(window.done, 1) if window else len(plan.sources)  # the first task is taken as it is
    if window is None or number >= len(plan.sources) or plan.devices > 1 or not hosts.is_alone:
        return None
    return CompileAhead(functools.partial(_prepare, plan, window, plan.sources[number].name))


def _prepare(plan: Plan, window: Window, name: str) -> None:
    rule = rule_of(plan, window)
    parts = zip(window.stacks, _ranks(plan, window, name), strict=True)
    vector = TaskVector(tuple(zeros_of(stack, rank) for stack, rank in parts), tuple(x.layers for x in window.stacks))
    # Headers do where the shapes alone matter.
    rule.prepare(rule.init(cast(Any, plan.base.tensors)), vector)


def touched(window: Window) -> tuple[str, ...]:
    """Names of the tensors that a window's layers are in, each once."""
    return tuple(dict.fromkeys(map(tensor_of, window.layers)))


def update(
    rule: methods.Merger,
    state: MergeState,
    task: TaskAtHand,
    watcher: Watcher,
    data: methods.TaskData | None,
    numbers: Numbers,
    ahead: CompileAhead | None = None,
) -> MergeState:
    """The window after one more task; gives up the memory of the state.

    Args:
      rule: for the window's layers.
      state: of the window.
      task: to be merged.
      watcher: is told of every stack.
      data: what the rule learns from.
      numbers: of the whole model.
      ahead: what compiles the program meanwhile; it is waited for.

    Raises:
      NufiltError: the rule refuses the task; the file is named.
    """
    how: dict[str, Any] = {"on_stack": watcher.stack, "donate": True, "data": data, "numbers": numbers}
    compiled = CompileLog()
    with naming_files(task.checkpoint), task.clock.spent_on("solve"), compiled.listening():
        if ahead is not None and state.step:
            with compiled.waiting():
                ahead.wait(watcher.compiling)
        # Waited for in here: until it is through, neither its time nor an error of it is known.
        state = jax.block_until_ready(rule.update(state, task.vector, **how))
    task.clock.add("compile", compiled.seconds)  # a part of "solve"
    return state


@contextlib.contextmanager
def naming_files(checkpoint: Checkpoint) -> Iterator[None]:
    """Names the files in what a rule raises, which knows canonical names only."""
    try:
        yield
    except NufiltError as error:
        raise type(error)(*(_in_file(checkpoint, problem) for problem in error.problems)) from error


def _in_file(checkpoint: Checkpoint, problem: Problem) -> Problem:
    info = checkpoint.tensors.get(tensor_of(problem.tensor))
    return problem if info is None else Problem(str(info.file), problem.what, problem.fix, info.stored_name)


def examples(plan: Plan, name: str, step: int) -> methods.TaskData | None:
    """What the rule learns from at a step, counted from 1; None if it needs nothing."""
    if not plan.examples:
        return None
    from nufilt_jax.engine.examples import drawing_seed, load_examples  # with models, which no other merge needs

    config = cast(LearningConfig, plan.settings.config)
    seed = drawing_seed(plan.settings.seed, step, name)
    return load_examples(plan.examples[name], plan.base.config, config, seed)


def file_entry(path: Path) -> dict[str, str]:
    """A file in the recipe, with its hash."""
    return {"file": str(path), "sha256": file_sha256(path)}
