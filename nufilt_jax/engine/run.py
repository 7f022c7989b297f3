"""Runs a plan: step after step, each one kept, until the model stands in its place."""

import dataclasses
import functools
import gc
import hashlib
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import jax

from nufilt_jax import methods
from nufilt_jax.anatomy import tensor_of
from nufilt_jax.checkpoints import Checkpoint, write_added, write_checkpoint
from nufilt_jax.checkpoints.tensors import PassingTensors
from nufilt_jax.engine.ahead import ReadAhead
from nufilt_jax.engine.coverage import outside_share
from nufilt_jax.engine.inspection import Inspection
from nufilt_jax.engine.journal import Journal
from nufilt_jax.engine.merged import merged_tensors
from nufilt_jax.engine.plan import Plan
from nufilt_jax.engine.recipe import forecast_entry, new_recipe, step_entry
from nufilt_jax.engine.timing import Clock, CompileLog
from nufilt_jax.errors import CheckpointError, EvaluationError, NufiltError, OutputError, Problem
from nufilt_jax.methods.adaptation import LearningConfig
from nufilt_jax.methods.stacked import Names, Params, TaskVector, stacked, task_vector
from nufilt_jax.methods.state import LayerReport, MergeState
from nufilt_jax.output.card import model_card
from nufilt_jax.output.place import OutputPlace


class Evaluation(Protocol):
    """Scores the merged model; see `engine.evaluation`."""

    def entry(self, params: Mapping[str, Any], task: str) -> dict[str, Any]:
        """What the recipe's entry of a step gets."""
        ...

    def covers(self, step: Mapping[str, Any]) -> bool:
        """Whether the recipe's entry of a step holds what `entry` would say."""
        ...

    def finish(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        """Adds files to the finished folder before it gets its name."""
        ...


@runtime_checkable
class Watcher(Protocol):
    """Is told how a run goes on."""

    def step(self, task: str, index: int, total: int) -> None:
        """Task number `index` of `total` begins, counted from 0."""
        ...

    def stack(self, description: str, report: LayerReport) -> None:
        """A group of layers is solved."""
        ...

    def phase(self, description: str) -> None:
        """Something else begins."""
        ...


def run(
    plan: Plan,
    inspection: Inspection,
    place: OutputPlace,
    watcher: Watcher,
    clock: Clock,
    *,
    evaluation: Evaluation | None = None,
) -> dict[str, Any]:
    """Merges what is not merged yet. The caller holds the place's lock.

    Args:
      plan: what to do.
      inspection: of the same plan.
      place: where to.
      watcher: is told of every step and stack.
      clock: gets the time of what does not belong to one step.
      evaluation: scores the merged model after every step, for the recipe; None leaves it out.

    Returns:
      The recipe. Steps that an earlier run had done are marked as resumed.

    Raises:
      NufiltError: a solution is not finite, the state is damaged, or the disk is full.
    """
    recipe = new_recipe(plan, inspection)
    if plan.is_finished:
        return recipe
    compiled = CompileLog()
    forecast = place.forecast(plan.done)
    try:
        with compiled.listening(), Journal(place, recipe, forecast, clock) as journal:
            state = _merge(plan, inspection, place, journal, watcher, evaluation)
            watcher.phase("writing the model")
            with clock.spent_on("write_model"):
                _write_model(plan, state, place)
            if evaluation is not None:
                evaluation.finish(place.staging, recipe)
            with clock.spent_on("wait_for_state"):
                journal.wait()
    except (OutputError, EvaluationError):  # what is done can be gone on with, elsewhere or without an evaluation
        raise
    except NufiltError:  # the same command would fail again, and another could not use what is done
        place.discard()
        raise
    recipe |= {"timings": clock.as_dict(), "compiled": compiled.as_dict()}
    place.publish(recipe, forecast, model_card(recipe))
    return recipe


def _write_model(plan: Plan, state: MergeState, place: OutputPlace) -> None:
    """The merged model in the place's staging folder; what cannot be written leaves all steps as they are.

    Raises:
      OutputError: the disk is full, or numbers are out of the range of the type asked for.
    """
    like, settings = plan.base, plan.settings
    try:
        write_checkpoint(merged_tensors(state), place.staging, like=like, format=settings.format, dtype=settings.dtype)
        if state.added:
            write_added(place.staging, state.added)
    except NufiltError as error:
        shutil.rmtree(place.staging, ignore_errors=True)
        if isinstance(error, OutputError):
            raise
        kept = f"what is merged is kept in {place.partial}"
        raise OutputError(*(p._replace(fix=f"{p.fix}; {kept}" if p.fix else kept) for p in error.problems)) from error


def _merge(
    plan: Plan,
    inspection: Inspection,
    place: OutputPlace,
    journal: Journal,
    watcher: Watcher,
    evaluation: Evaluation | None,
) -> MergeState:
    """The state after all tasks; the journal gets an entry for each task merged here.

    Beside D and the task vector at most one thing of a model's size is in memory. While a task is merged that takes
    long, it is a copy of the D before, which is being written, and after that the next task, which is being read. Where
    merging is quicker than writing, a copy would hide nothing: D itself is written, while the next task is read.
    """
    settings = plan.settings
    rule = methods.get(
        settings.method,
        settings.config,
        seed=settings.seed,
        layers=settings.layers,
        other_params=settings.other_params,
        conv=settings.conv,
        selection=plan.selection,
    )
    # Only a rule that runs the model needs the tensors that it does not touch.
    state = rule.init(plan.base.read(None if plan.examples else plan.selection.touched))
    if plan.done:
        state = _restored(state, place, plan.done)
    pending = [source.name for source in plan.sources[plan.done :]]
    if pending:
        journal.begin()
    load, solve_seconds = functools.partial(_load, plan, state.base, state.delta.names), 0.0
    with ReadAhead(load, pending) as tasks:
        for index, name in enumerate(pending, plan.done):
            watcher.step(name, index, len(plan.sources))
            start = time.perf_counter()
            task = tasks.take()
            task.clock.add("wait", time.perf_counter() - start)
            if _hides_all(solve_seconds, journal.write_seconds, task.clock.seconds("read")):
                tasks.begin(after=journal.under_way)
            begun = time.perf_counter()
            state = _update(rule, state, task, watcher, _examples(plan, name, index + 1))
            solve_seconds = time.perf_counter() - begun
            outside = outside_share(plan.base, plan.selection, inspection.changes.get(name, {}))
            entry = step_entry(name, time.perf_counter() - start, state.report)
            entry |= {"outside": round(outside, 6), "timings": task.clock.as_dict()}
            if plan.examples:
                entry["examples"] = _examples_entry(plan.examples[name])
            del task  # before D is copied, or the next one is read
            gc.collect(0)  # where JAX lets go of host memory that was the device's too; else when a program runs next
            if evaluation is not None:
                with journal.clock.spent_on("evaluate"):
                    entry |= evaluation.entry(_whole(plan, state), name)
            _keep(journal, tasks, entry, forecast_entry(name, state.report), state)
    last = journal.recipe["steps"][-1]
    if evaluation is not None and not evaluation.covers(last):  # a run that did not evaluate has merged it
        last |= evaluation.entry(_whole(plan, state), last["task"])
    return state


def _hides_all(solve: float, write: float, read: float) -> bool:
    """Whether a state and a task can be written and read while a task is merged, by the last seconds of each."""
    return solve > write + read


def _keep(
    journal: Journal, tasks: ReadAhead[str, "Task"], entry: dict[str, Any], forecast: dict[str, Any], state: MergeState
) -> None:
    """Makes a step durable: from a copy of D if the next task waits to be merged into it, else from D itself."""
    if tasks.has_begun:
        journal.add(entry, forecast, state, copy=True)
        return
    tasks.begin()
    journal.add(entry, forecast, state, copy=False)
    if tasks.has_begun:  # after the last task nobody takes the memory of D
        with journal.clock.spent_on("copy_state"):
            journal.wait()


def _whole(plan: Plan, state: MergeState) -> dict[str, Any]:
    """All parameters of the merged model."""
    merged = {name: tensor.made() for name, tensor in merged_tensors(state).items()}
    return {**plan.base.read(), **merged, **state.added}


def _restored(state: MergeState, place: OutputPlace, done: int) -> MergeState:
    """The state after `done` tasks, as an earlier run left it.

    Raises:
      CheckpointError: it is damaged.
    """
    arrays = place.load_state(done)
    delta = arrays.get("delta", {})
    if {name: x.shape for name, x in delta.items()} != state.delta.shapes:
        what = "the state of the merge does not hold the tensors that the recipe selects"
        raise CheckpointError(Problem(str(place.out), what, "merge again from the start"))
    delta, extra, added = stacked(delta, state.delta.names), arrays.get("extra", {}), arrays.get("added", {})
    return dataclasses.replace(state, delta=delta, extra=extra, added=added, step=done)


class Task(NamedTuple):
    """A task that is ready to be merged, and the time that reading it took."""

    name: str
    checkpoint: Checkpoint
    vector: TaskVector
    clock: Clock


def _load(plan: Plan, base: Params, names: Names, name: str, stop: threading.Event) -> Task:
    """Forms a task vector on the device, tensor by tensor from the mapped base and the task's files."""
    checkpoint, clock = plan.tasks[name], Clock()
    theirs = checkpoint.unread(plan.selection.touched, stop=stop)
    with clock.spent_on("read"):
        vector = task_vector(PassingTensors(base), theirs, names)
    with clock.spent_on("put"):
        jax.block_until_ready(vector.stacks)
    return Task(name, checkpoint, vector, clock)


def _examples(plan: Plan, name: str, step: int) -> methods.TaskData | None:
    if not plan.examples:
        return None
    from nufilt_jax.engine.examples import drawing_seed, load_examples  # with models, which no other merge needs

    config = cast(LearningConfig, plan.settings.config)
    seed = drawing_seed(plan.settings.seed, step, name)
    return load_examples(plan.examples[name], plan.base.config, config, seed)


def _examples_entry(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        return {"file": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _update(
    rule: methods.Merger, state: MergeState, task: Task, watcher: Watcher, data: methods.TaskData | None
) -> MergeState:
    try:
        with task.clock.spent_on("solve"):
            return jax.block_until_ready(
                rule.update(state, task.vector, on_stack=watcher.stack, donate=True, data=data)
            )
    except NufiltError as error:  # a rule knows canonical names only, and no files
        raise type(error)(*(_in_file(task.checkpoint, problem) for problem in error.problems)) from error


def _in_file(checkpoint: Checkpoint, problem: Problem) -> Problem:
    info = checkpoint.tensors.get(tensor_of(problem.tensor))
    return problem if info is None else Problem(str(info.file), problem.what, problem.fix, info.stored_name)
