"""Runs a plan: step after step, each one kept, until the model stands in its place."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from nufilt_jax import methods
from nufilt_jax.checkpoints import write_checkpoint
from nufilt_jax.checkpoints.place import OutputPlace
from nufilt_jax.errors import CheckpointError, NufiltError, OutputError, Problem
from nufilt_jax.methods.state import LayerReport, MergeState, merged_tensor
from nufilt_jax.pipeline.card import model_card
from nufilt_jax.pipeline.inspection import Inspection
from nufilt_jax.pipeline.plan import Plan
from nufilt_jax.pipeline.recipe import forecast_entry, new_recipe, step_entry

Evaluate = Callable[[Mapping[str, Any]], dict[str, float]]
Finish = Callable[[Path, dict[str, Any]], None]


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
    *,
    evaluate: Evaluate | None = None,
    finish: Finish | None = None,
) -> dict[str, Any]:
    """Merges what is not merged yet. The caller holds the place's lock.

    Args:
      plan: what to do.
      inspection: of the same plan.
      place: where to.
      watcher: is told of every step and stack.
      evaluate: measures the merged model after every step, for the recipe.
      finish: adds files to the finished folder before it gets its name.

    Returns:
      The recipe. Steps that an earlier run had done are marked as resumed.

    Raises:
      NufiltError: a solution is not finite, the state is damaged, or the disk is full.
    """
    recipe = new_recipe(plan, inspection)
    if plan.is_finished:
        return recipe
    forecast = place.forecast(plan.done)
    try:
        state = _merge(plan, place, recipe, forecast, watcher, evaluate)
        watcher.phase("writing the model")
        like, settings = plan.base, plan.settings
        write_checkpoint(_merged(state), place.staging, like=like, format=settings.format, dtype=settings.dtype)
        if finish is not None:
            finish(place.staging, recipe)
    except OutputError:  # full or gone: what is done can be gone on with
        raise
    except NufiltError:  # the same command would fail again, and another could not use what is done
        place.discard()
        raise
    place.publish(recipe, forecast, model_card(recipe))
    return recipe


def _merge(
    plan: Plan,
    place: OutputPlace,
    recipe: dict[str, Any],
    forecast: dict[str, Any],
    watcher: Watcher,
    evaluate: Evaluate | None,
) -> MergeState:
    """The state after all tasks; recipe and forecast get an entry for each task merged here."""
    settings = plan.settings
    rule = methods.get(
        settings.method,
        settings.config,
        seed=settings.seed,
        layers=settings.layers,
        other_params=settings.other_params,
    )
    state = rule.init(plan.base.read(plan.selection.touched))
    if plan.done:
        state = _restored(state, place, plan.done)
    if plan.done < len(plan.sources):
        place.record(recipe, forecast, None)
    for index, source in enumerate(plan.sources[plan.done :], plan.done):
        watcher.step(source.name, index, len(plan.sources))
        start = time.perf_counter()
        state = _update(rule, state, plan, source.name, watcher)
        arrays = {"delta": {name: np.asarray(x) for name, x in state.delta.items()}, "extra": state.extra}
        entry = step_entry(source.name, time.perf_counter() - start, state.report)
        if evaluate is not None:
            watcher.phase(f"evaluating after {source.name}")
            entry["accuracy"] = evaluate({**plan.base.read(), **_merged(state)})
        recipe["steps"].append(entry)
        forecast["steps"].append(forecast_entry(source.name, state.report))
        place.record(recipe, forecast, arrays)
    return state


def _restored(state: MergeState, place: OutputPlace, done: int) -> MergeState:
    """The state after `done` tasks, as an earlier run left it.

    Raises:
      CheckpointError: it is damaged.
    """
    arrays = place.load_state(done)
    expected = {name: x.shape for name, x in state.delta.items()}
    if {name: x.shape for name, x in arrays.get("delta", {}).items()} != expected:
        what = "the state of the merge does not hold the tensors that the recipe selects"
        raise CheckpointError(Problem(str(place.out), what, "merge again from the start"))
    return dataclasses.replace(state, delta=arrays["delta"], extra=arrays.get("extra", {}), step=done)


def _update(rule: methods.Merger, state: MergeState, plan: Plan, name: str, watcher: Watcher) -> MergeState:
    task = plan.tasks[name]
    try:
        return rule.update(state, task.read(plan.selection.touched), on_stack=watcher.stack)
    except NufiltError as error:  # a rule knows canonical names only, and no files
        infos = [task.tensors[problem.tensor] for problem in error.problems]
        pairs = zip(infos, error.problems, strict=True)
        raise type(error)(*(Problem(str(i.file), p.what, p.fix, i.stored_name) for i, p in pairs)) from error


def _merged(state: MergeState) -> dict[str, np.ndarray]:
    """The touched tensors in float32: rounded once, when written."""
    return {
        name: np.asarray(merged_tensor(state.base[name], np.asarray(delta), np.dtype(np.float32)))
        for name, delta in state.delta.items()
    }
