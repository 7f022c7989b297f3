"""Runs a plan: step after step, each one kept, until the model stands in its place."""

import contextlib
import dataclasses
import functools
import hashlib
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import jax
import numpy as np

from nufilt_jax import methods
from nufilt_jax.anatomy import tensor_of
from nufilt_jax.checkpoints import Checkpoint, write_added, write_checkpoint
from nufilt_jax.checkpoints.place import OutputPlace
from nufilt_jax.config import LearningConfig
from nufilt_jax.errors import CheckpointError, EvaluationError, NufiltError, OutputError, Problem
from nufilt_jax.methods.stacked import Names, TaskVector, stacked, task_vector
from nufilt_jax.methods.state import LayerReport, MergeState, merged_tensor
from nufilt_jax.pipeline.ahead import read_ahead
from nufilt_jax.pipeline.card import model_card
from nufilt_jax.pipeline.inspection import Inspection
from nufilt_jax.pipeline.journal import Journal
from nufilt_jax.pipeline.plan import Plan
from nufilt_jax.pipeline.recipe import forecast_entry, new_recipe, step_entry
from nufilt_jax.pipeline.timing import Clock, CompileLog


class Evaluation(Protocol):
    """Scores the merged model; see `pipeline.evaluation`."""

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
            state = _merge(plan, place, journal, watcher, evaluation)
            watcher.phase("writing the model")
            with clock.spent_on("write_model"):
                like, settings = plan.base, plan.settings
                write_checkpoint(_merged(state), place.staging, like=like, format=settings.format, dtype=settings.dtype)
                if state.added:
                    write_added(place.staging, state.added)
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


def _merge(
    plan: Plan, place: OutputPlace, journal: Journal, watcher: Watcher, evaluation: Evaluation | None
) -> MergeState:
    """The state after all tasks; the journal gets an entry for each task merged here.

    While a task is merged, the next one is read and the state after the one before is written.
    """
    settings = plan.settings
    rule = methods.get(
        settings.method,
        settings.config,
        seed=settings.seed,
        layers=settings.layers,
        other_params=settings.other_params,
    )
    # Only a rule that runs the model needs the tensors that it does not touch.
    state = rule.init(plan.base.read(None if plan.examples else plan.selection.touched))
    if plan.done:
        state = _restored(state, place, plan.done)
    pending = [source.name for source in plan.sources[plan.done :]]
    if pending:
        journal.begin()
    load = functools.partial(_load, plan, state.delta.names)
    with contextlib.closing(read_ahead(load, pending)) as tasks:
        for index, name in enumerate(pending, plan.done):
            watcher.step(name, index, len(plan.sources))
            start = time.perf_counter()
            task = next(tasks)
            task.clock.add("wait", time.perf_counter() - start)
            state = _update(rule, state, task, watcher, _examples(plan, name, index + 1))
            entry = step_entry(name, time.perf_counter() - start, state.report) | {"timings": task.clock.as_dict()}
            if plan.examples:
                entry["examples"] = _examples_entry(plan.examples[name])
            del task  # before the one after the next is read
            if evaluation is not None:
                with journal.clock.spent_on("evaluate"):
                    entry |= evaluation.entry(_whole(plan, state), name)
            journal.add(entry, forecast_entry(name, state.report), state)
    last = journal.recipe["steps"][-1]
    if evaluation is not None and not evaluation.covers(last):  # a run that did not evaluate has merged it
        last |= evaluation.entry(_whole(plan, state), last["task"])
    return state


def _whole(plan: Plan, state: MergeState) -> dict[str, Any]:
    """All parameters of the merged model."""
    return {**plan.base.read(), **_merged(state), **state.added}


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


def _load(plan: Plan, names: Names, name: str, stop: threading.Event) -> Task:
    """Forms a task vector on the device, tensor by tensor from the files."""
    checkpoint, clock = plan.tasks[name], Clock()
    wanted = plan.selection.touched
    with clock.spent_on("read"):
        vector = task_vector(plan.base.unread(wanted, stop=stop), checkpoint.unread(wanted, stop=stop), names)
    with clock.spent_on("put"):
        jax.block_until_ready(vector.stacks)
    return Task(name, checkpoint, vector, clock)


def _examples(plan: Plan, name: str, step: int) -> methods.TaskData | None:
    if not plan.examples:
        return None
    from nufilt_jax.pipeline.examples import drawing_seed, load_examples  # with models, which no other merge needs

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
            return rule.update(state, task.vector, on_stack=watcher.stack, donate=True, data=data)
    except NufiltError as error:  # a rule knows canonical names only, and no files
        raise type(error)(*(_in_file(task.checkpoint, problem) for problem in error.problems)) from error


def _in_file(checkpoint: Checkpoint, problem: Problem) -> Problem:
    info = checkpoint.tensors.get(tensor_of(problem.tensor))
    return problem if info is None else Problem(str(info.file), problem.what, problem.fix, info.stored_name)


def _merged(state: MergeState) -> dict[str, np.ndarray]:
    """The touched tensors in float32: rounded once, when written."""
    return {
        name: np.asarray(merged_tensor(state.base[name], delta, np.dtype(np.float32)))
        for name, delta in state.delta.copied().on_host().items()
    }
