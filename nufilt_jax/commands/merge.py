"""One `merge` command: from parsed arguments to an exit status."""

import contextlib
import dataclasses
import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from nufilt_jax.commands import console as show
from nufilt_jax.commands import watched
from nufilt_jax.commands.arguments import Arguments
from nufilt_jax.commands.backend import require_backend
from nufilt_jax.commands.failures import traceback_beside, traceback_kept
from nufilt_jax.commands.planned import plan_document, show_plan
from nufilt_jax.commands.request import check_usage, cluster_of, continued_job, new_job
from nufilt_jax.commands.settings import settings_as_given
from nufilt_jax.engine.coverage import coverage, outside_warnings
from nufilt_jax.engine.estimate import estimate
from nufilt_jax.engine.hosts import Hosts, together
from nufilt_jax.engine.inspection import inspect
from nufilt_jax.engine.plan import Plan, make_plan
from nufilt_jax.engine.records import facts, layers_as_begun
from nufilt_jax.engine.run import run
from nufilt_jax.engine.timing import Clock
from nufilt_jax.linalg.dispatch import at_once
from nufilt_jax.output.place import OutputPlace
from nufilt_jax.presets import TINY

if TYPE_CHECKING:
    from nufilt_jax.engine.evaluation import Evaluation


def execute(arguments: Arguments, stdout: Console, stderr: Console) -> int:
    """Plans, and runs unless only the plan is wanted.

    Raises:
      NufiltError: with every problem found.
    """
    check_usage(arguments)
    with settings_as_given():
        if arguments.plan:
            with tempfile.TemporaryDirectory(prefix="nufilt-") as scratch:
                _plan(arguments, Path(scratch), stdout, stderr)
        else:
            _run(arguments, stdout, stderr)
    return 0


def _plan(arguments: Arguments, scratch: Path, stdout: Console, stderr: Console) -> None:
    from nufilt_jax.zoo.store import family_folder

    # A plan writes nothing: built-in checkpoints that are not in the cache yet are planned from a passing copy.
    zoo = None if arguments.model != TINY or family_folder().exists() else scratch
    watcher = _watcher(arguments, stderr)
    with watcher.progress:
        watcher.phase("reading headers")
        job = new_job(arguments, zoo) if arguments.add is None else continued_job(arguments, OutputPlace(arguments.add))
        plan = make_plan(job, offline=arguments.offline, headers_only=True)
    show.show_warnings(stderr, plan.warnings)
    if arguments.json:
        show.show_json(stdout, plan_document(plan, estimate(plan), zoo))
    elif not arguments.quiet:
        show_plan(stdout, plan, estimate(plan), zoo)


def _run(arguments: Arguments, stdout: Console, stderr: Console) -> None:
    with together(cluster_of(arguments)) as hosts:
        if not hosts.is_alone:
            watched.have_come()
            require_backend()
            hosts.start_devices()
        # Of several processes the first one speaks, but for the one that has something to refuse.
        nowhere = Console(file=io.StringIO())
        _merge(arguments, hosts, *((stdout, stderr) if hosts.is_first else (nowhere, nowhere)))


def _merge(arguments: Arguments, hosts: Hosts, stdout: Console, stderr: Console) -> None:
    job = None if arguments.add is not None else new_job(arguments)
    place = OutputPlace(cast(Path, arguments.add or (job and job.out)))  # None is for plans, see check_usage
    watcher = _watcher(arguments, stderr)
    locked = place.locked() if hosts.is_first else contextlib.nullcontext()
    with traceback_kept(traceback_beside(place.out)), locked, at_once(layers_as_begun(place)), watcher.progress:
        clock, agreed = Clock(), hosts.agreed()
        with clock.spent_on("plan"):
            asked_for = job or continued_job(arguments, place)
            plan = make_plan(dataclasses.replace(asked_for, agreed=agreed), offline=arguments.offline)
        show.show_warnings(stderr, plan.warnings)
        evaluation = _evaluation(plan, watcher, is_study=arguments.model == TINY)
        with clock.spent_on("inspect"):
            inspection = inspect(plan)
        if not hosts.is_alone:
            hosts.compare("planned", facts(plan, inspection))
        show.show_warnings(stderr, inspection.warnings)
        show.show_warnings(stderr, outside_warnings(plan.base, plan.selection, plan.settings, inspection.changes))
        watcher.head(plan, *coverage(plan, inspection.changes))
        recipe = run(plan, inspection, place, watcher, clock, evaluation=evaluation, hosts=hosts)
        scores = _scores(plan, place, watcher)
    show.show_warnings(stderr, (*place.warnings, *(evaluation.warnings if evaluation else ())))
    if arguments.json:
        # With full paths, where nufilt.json has them relative to its folder: what reads this stands anywhere.
        told = {"out": str(place.out), **recipe.to_json()}
        show.show_json(stdout, told | ({"evaluation": scores} if scores else {}))
    elif not arguments.quiet:
        show.show_result(stdout, recipe, str(place.out), is_told=watcher.has_told and stdout.is_terminal)
        if scores:
            show.show_scores(stdout, scores)


def _watcher(arguments: Arguments, stderr: Console) -> show.ProgressWatcher:
    """What shows how it goes on: nothing with --quiet, and with --json what --verbose asks for."""
    verbose = arguments.verbose and not arguments.quiet
    return show.ProgressWatcher(stderr, quiet=arguments.quiet or arguments.json, verbose=verbose)


def _evaluation(plan: Plan, watcher: show.ProgressWatcher, *, is_study: bool) -> "Evaluation | None":
    """What scores the model after every step; None if that is not wanted, or nothing is left to merge."""
    if plan.evaluation is None or plan.is_finished:
        return None
    from nufilt_jax.engine.evaluation import Evaluation, open_suite
    from nufilt_jax.engine.tiny import TinyStudy

    names = [source.name for source in plan.sources]
    watcher.phase("opening the tasks' data")
    suite = open_suite(names, plan.base, plan.evaluation)
    compare = TinyStudy(names, suite).rows if is_study else None
    return Evaluation(names, suite, plan.evaluation, watcher.phase, compare)


def _scores(plan: Plan, place: OutputPlace, watcher: show.ProgressWatcher) -> dict[str, Any] | None:
    """What `evaluation.json` holds; a merge that was finished without it, or asked otherwise, is evaluated now."""
    if plan.evaluation is None:
        return None
    from nufilt_jax.engine.evaluation import evaluate_folder, evaluation_there

    names = [source.name for source in plan.sources]
    there = evaluation_there(place.out, names, plan.evaluation)
    if there and any(row["name"] == plan.settings.method for row in there["models"]):
        return there
    return evaluate_folder(place.out, (), plan.evaluation, watcher.phase)
