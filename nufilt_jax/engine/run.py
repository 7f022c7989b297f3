"""Runs a plan: the grid is walked, the model written, and all of it published under its name."""

import dataclasses
import shutil

from nufilt_jax.checkpoints import write_added, write_checkpoint
from nufilt_jax.engine.adapter_output import told_of, write_merged_adapter
from nufilt_jax.engine.cell import compiled_ahead
from nufilt_jax.engine.coverage import outside_share
from nufilt_jax.engine.hosts import Hosts, StoppedError
from nufilt_jax.engine.inspection import Inspection
from nufilt_jax.engine.memory import peak_memory
from nufilt_jax.engine.merged import merged_tensors
from nufilt_jax.engine.plan import Plan
from nufilt_jax.engine.records import device_entry, new_recipe, this_host
from nufilt_jax.engine.timing import Clock, CompileLog
from nufilt_jax.engine.unchanged import ChangedError, HashedFiles
from nufilt_jax.engine.walk import Walk
from nufilt_jax.engine.watching import Scorer, Watcher
from nufilt_jax.errors import EvaluationError, NufiltError, OutputError, Problem, SolveError
from nufilt_jax.methods import find
from nufilt_jax.output.card import model_card
from nufilt_jax.output.facts import Compiled, MergedAdapter
from nufilt_jax.output.place import OutputPlace
from nufilt_jax.output.recipe import Recipe
from nufilt_jax.output.stored import Stored


def run(
    plan: Plan,
    inspection: Inspection,
    place: OutputPlace,
    watcher: Watcher,
    clock: Clock,
    *,
    evaluation: Scorer | None = None,
    hosts: Hosts | None = None,
) -> Recipe:
    """Merges what is not merged yet. The caller holds the place's lock, or the first of several processes does.

    Args:
      plan: what to do.
      inspection: of the same plan.
      place: where to.
      watcher: is told of every cell and stack.
      clock: gets the time of what does not belong to one step.
      evaluation: scores the merged model after every step, for the recipe; None leaves it out.
      hosts: the processes that share the work; None for this one alone.

    Returns:
      The recipe. Steps that an earlier run had done are marked as resumed.

    Raises:
      NufiltError: a solution is not finite, the state is damaged, a model has changed, or the disk is full.
    """
    hosts = hosts or Hosts()
    if plan.recorded is not None and plan.is_finished:
        return plan.recorded.recipe.as_resumed()
    recipe = new_recipe(plan, inspection)
    told = hosts.meet("host", [this_host().to_json(), device_entry()])
    if any(other != told[0] for other in told):
        recipe = dataclasses.replace(recipe, host=dataclasses.replace(recipe.host, is_mixed=True))
    compiled, ahead = CompileLog(watcher.compiling), compiled_ahead(plan, hosts)
    outside = {name: outside_share(plan.base, plan.selection, moved) for name, moved in inspection.changes.items()}
    try:
        with compiled.listening(), plan.recorded.stored if plan.recorded else Stored() as stored:
            walk = Walk(
                plan, recipe, place, stored, watcher, clock, evaluation, outside, hosts, ahead, inspection.files
            )
            walk.go()
            recipe = walk.recipe()
            watcher.merged()
            watcher.phase("writing the model")
            with clock.spent_on("write_model"), (writing := CompileLog()).listening():
                adapter = _write_model(plan, walk, place, inspection.files, hosts)
            clock.add("compile", writing.seconds)  # a part of "write_model"
            recipe = dataclasses.replace(recipe, adapter=adapter)
            if evaluation is not None:
                evaluation.finish(place.staging, recipe)
    except (OutputError, EvaluationError):  # what is done can be gone on with, elsewhere or without an evaluation
        raise
    except (SolveError, ChangedError) as error:
        raise (_kept(error, place) if hosts.is_alone else error) from error
    except NufiltError:  # the same command would fail again, and another could not use what is done
        if hosts.is_alone:
            place.discard()
        raise
    memory = dataclasses.replace(plan.memory.told(), peak=peak_memory())
    counted = compiled if ahead is None else compiled.with_those_of(ahead.log)
    recipe = dataclasses.replace(recipe, timings=clock.as_dict(), compiled=Compiled(**counted.as_dict()), memory=memory)
    rule = find(plan.settings.method)
    told = recipe.as_seen_from(place.out)
    card = model_card(told, rule.source, needs_data=rule.needs_data, adds_parameters=rule.adds_parameters)
    if hosts.is_first:
        recipe = place.publish(recipe, walk.forecast(), card, walk.windows)
    hosts.meet("published")
    return recipe


def _write_model(plan: Plan, walk: Walk, place: OutputPlace, files: HashedFiles, hosts: Hosts) -> MergedAdapter | None:
    """The merged model in the place's staging folder; what cannot be written leaves all steps as they are.

    Of several processes each writes some of the weight files, and an adapter the first one alone.

    Returns:
      The adapter, if that is the output.

    Raises:
      OutputError: the disk is full, numbers are out of the range of the type asked for, or the base has changed.
    """
    settings = plan.settings
    try:
        adapter = told_of(plan) if settings.output == "adapter" else None
        with files.required(plan.base):
            if adapter is None:
                _write_whole(plan, walk, place, hosts)
            elif hosts.is_first:
                adapter = write_merged_adapter(plan, walk.delta, adapter, place.staging)
        hosts.meet("written")
        return adapter
    except StoppedError:
        raise
    except NufiltError as error:
        shutil.rmtree(place.staging, ignore_errors=True)
        if isinstance(error, OutputError):
            raise
        raise OutputError(*_with_kept(error, place)) from error


def _kept(error: NufiltError, place: OutputPlace) -> NufiltError:
    """The same refusal, which says that the steps before it stand; nothing is left behind where there are none."""
    if not place.has_state:
        place.discard()
        return error
    return type(error)(*_with_kept(error, place))


def _with_kept(error: NufiltError, place: OutputPlace) -> list[Problem]:
    kept = f"what is merged is kept in {place.partial}"
    return [problem._replace(fix=f"{problem.fix}; {kept}" if problem.fix else kept) for problem in error.problems]


def _write_whole(plan: Plan, walk: Walk, place: OutputPlace, hosts: Hosts) -> None:
    like, settings = plan.base, plan.settings
    tensors = merged_tensors(like.read(plan.selection.touched), walk.delta)
    how = {"format": settings.format, "dtype": settings.dtype, "part": (hosts.index, hosts.count)}
    write_checkpoint(tensors, place.staging, like=like, **how)
    if hosts.is_first and (added := walk.added):
        write_added(place.staging, added)
