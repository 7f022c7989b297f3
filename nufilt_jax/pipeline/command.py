"""One `merge` command: from parsed arguments to an exit status."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from nufilt_jax.checkpoints.place import OutputPlace, read_json
from nufilt_jax.pipeline import console as show
from nufilt_jax.pipeline.arguments import Arguments
from nufilt_jax.pipeline.inspection import inspect
from nufilt_jax.pipeline.method_help import method_documents, method_lines
from nufilt_jax.pipeline.plan import Plan, make_plan
from nufilt_jax.pipeline.request import check_usage, continued_job, new_job
from nufilt_jax.pipeline.run import run
from nufilt_jax.pipeline.timing import Clock
from nufilt_jax.presets import TINY

if TYPE_CHECKING:
    from nufilt_jax.pipeline.tiny import TinyStudy


def execute(arguments: Arguments, stdout: Console, stderr: Console) -> int:
    """Plans, and runs unless only the plan is wanted.

    Raises:
      NufiltError: with every problem found.
    """
    if arguments.method == "help":
        _help(arguments, stdout)
        return 0
    check_usage(arguments)
    if arguments.plan:
        with tempfile.TemporaryDirectory(prefix="nufilt-") as scratch:
            _plan(arguments, Path(scratch), stdout, stderr)
    else:
        _run(arguments, stdout, stderr)
    return 0


def _help(arguments: Arguments, stdout: Console) -> None:
    if arguments.json:
        show.show_json(stdout, {"methods": method_documents()})
    else:
        for line in method_lines():
            show.show_line(stdout, line)


def _plan(arguments: Arguments, scratch: Path, stdout: Console, stderr: Console) -> None:
    from nufilt_jax.zoo.store import default_folder

    # A plan writes nothing: built-in checkpoints that are not in the cache yet are planned from a passing copy.
    zoo = None if default_folder().exists() else scratch
    job = new_job(arguments, zoo) if arguments.add is None else continued_job(arguments, OutputPlace(arguments.add))
    plan = make_plan(job, offline=arguments.offline, headers_only=True)
    show.show_warnings(stderr, plan.warnings)
    if arguments.json:
        show.show_json(stdout, show.plan_document(plan))
    elif not arguments.quiet:
        show.show_plan(stdout, plan)


def _run(arguments: Arguments, stdout: Console, stderr: Console) -> None:
    job = None if arguments.add is not None else new_job(arguments)
    place = OutputPlace(cast(Path, arguments.add or (job and job.out)))  # None is for plans, see check_usage
    watcher = show.ProgressWatcher(stderr, quiet=arguments.quiet or arguments.json)
    with place.locked(), watcher.progress:
        clock = Clock()
        with clock.spent_on("plan"):
            plan = make_plan(job or continued_job(arguments, place), offline=arguments.offline)
        show.show_warnings(stderr, plan.warnings)
        with clock.spent_on("inspect"):
            inspection = inspect(plan)
        show.show_warnings(stderr, inspection.warnings)
        study = _study(arguments, plan)
        recipe = run(
            plan,
            inspection,
            place,
            watcher,
            clock,
            evaluate=study.evaluate if study else None,
            finish=study.finish if study else None,
        )
    show.show_warnings(stderr, tuple(study.warnings) if study else ())
    evaluation = _evaluation(place) if arguments.model == TINY else {}
    if arguments.json:
        show.show_json(stdout, {"out": str(place.out), **recipe, **evaluation})
    elif not arguments.quiet:
        show.show_result(stdout, recipe, str(place.out))
        if evaluation:
            show.show_scores(stdout, evaluation["evaluation"])


def _study(arguments: Arguments, plan: Plan) -> "TinyStudy | None":
    """The evaluation of the built-in tasks; None where there is none, or an earlier run has left it out."""
    if arguments.model != TINY or plan.is_finished:
        return None
    if plan.recorded is not None and any("accuracy" not in step for step in plan.recorded.steps):
        return None
    from nufilt_jax.pipeline.tiny import TinyStudy

    return TinyStudy(tuple(source.name for source in plan.sources))


def _evaluation(place: OutputPlace) -> dict[str, Any]:
    """What an evaluation left in the output folder; empty if there is none."""
    from nufilt_jax.pipeline.tiny import EVALUATION

    scores = place.out / EVALUATION
    return {"evaluation": read_json(scores)} if scores.is_file() else {}
