"""The command `evaluate`: scores of the model in a folder."""

from pathlib import Path

from rich.console import Console

from nufilt_jax.commands import console as show
from nufilt_jax.commands.arguments import EvaluateArguments
from nufilt_jax.commands.failures import traceback_beside, traceback_kept
from nufilt_jax.commands.settings import read_evaluation
from nufilt_jax.engine.evaluation import evaluate_folder
from nufilt_jax.errors import CheckpointError, ConfigError, Problem, raise_all
from nufilt_jax.output.place import OutputPlace


def evaluate(folder: Path, arguments: EvaluateArguments, stdout: Console, stderr: Console) -> int:
    """Scores a model on its tasks, and writes `evaluation.json` into its folder.

    Raises:
      NufiltError: with everything that is missing or does not fit.
    """
    problems: list[Problem] = []
    options = read_evaluation(arguments, problems)
    raise_all(ConfigError, problems)
    if not folder.is_dir():
        raise CheckpointError(Problem(str(folder), "there is no such folder", "give the output folder of a merge"))
    place = OutputPlace(folder)
    watcher = show.ProgressWatcher(stderr, quiet=arguments.quiet or arguments.json)
    with traceback_kept(traceback_beside(place.out)), place.locked(), watcher.progress:
        document = evaluate_folder(place.out, arguments.task, options, watcher.phase)
    if arguments.json:
        show.show_json(stdout, {"out": str(place.out), "evaluation": document})
    elif not arguments.quiet:
        show.show_scores(stdout, document)
    return 0
