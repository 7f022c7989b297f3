"""The commands and their options: what is parsed, and nothing of what it does."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from nufilt_jax import __version__
from nufilt_jax.commands.arguments import AnalyzeArguments, Arguments, EvaluateArguments, Flag, Whole, home_expanded
from nufilt_jax.commands.extract_arguments import ExtractArguments
from nufilt_jax.commands.streams import Output
from nufilt_jax.errors import Problem, UsageError

NO_ARGUMENTS = Arguments()
ANALYZE_DEFAULTS = AnalyzeArguments()
EVALUATE_DEFAULTS = EvaluateArguments()
EXTRACT_DEFAULTS = ExtractArguments()
WIDE = 1000  # columns of what is no terminal: nothing is wrapped or cut in a file or a pipe
Folder = Annotated[Path, Parameter(converter=home_expanded)]
_BARE: dict[str, Any] = {"result_action": "return_value", "suppress_keyboard_interrupt": False}  # `main` does the rest

app = App(
    name="nufilt",
    version=__version__,
    help="Data-free continual model merging at compiled speed (NUFILT, arXiv:2509.21413v2).",
    **_BARE,
)


@app.command
def merge(arguments: Arguments = NO_ARGUMENTS) -> int:
    """Merge fine-tuned models into one, one after another, without data.

    The same command again resumes an interrupted merge.
    """
    from nufilt_jax.commands.merge import execute

    if not arguments.plan and arguments.method != "help":  # which need no device
        _require_backend()
    return execute(arguments, _console(), _console(stderr=True))


@app.command
def add(folder: Folder, /, arguments: Arguments = NO_ARGUMENTS) -> int:
    """Merge one more task into a finished or interrupted merge: merge --add FOLDER.

    Args:
      folder: The output folder of the merge.
      arguments: The options of merge.
    """
    if arguments.add is not None:
        raise UsageError(Problem("--add", "the folder is given already", "leave it out"))
    return merge(dataclasses.replace(arguments, add=folder))


@app.command
def plan(arguments: Arguments = NO_ARGUMENTS) -> int:
    """Say what a merge would do, from headers alone, and write nothing: merge --plan."""
    return merge(dataclasses.replace(arguments, plan=True))


@app.command
def evaluate(folder: Folder, /, arguments: EvaluateArguments = EVALUATE_DEFAULTS) -> int:
    """Measure a merged model, or any other, on its tasks, and write evaluation.json into its folder.

    Args:
      folder: The output folder of the merge, or a model folder.
      arguments: The options.
    """
    from nufilt_jax.commands.evaluate import evaluate

    _require_backend()
    return evaluate(folder, arguments, _console(), _console(stderr=True))


@app.command
def analyze(folder: Folder, /, arguments: AnalyzeArguments = ANALYZE_DEFAULTS) -> int:
    """Say what a finished merge did, in numbers, pictures and one HTML page, all written into its folder.

    Args:
      folder: The output folder of the merge.
      arguments: The options.
    """
    from nufilt_jax.commands.analyze import analyze

    _require_backend()
    return analyze(folder, arguments, _console(), _console(stderr=True))


@app.command
def verify(
    folder: Folder, /, *, quick: Flag = False, json: Flag = False, quiet: Flag = False, offline: Flag = False
) -> int:
    """Check a finished merge against its recipe: inputs and files by their hashes, and every number by merging again.

    Args:
      folder: The output folder of the merge.
      quick: Hash inputs and outputs alone, and do not merge again.
      json: One JSON document on stdout and nothing else there.
      quiet: Nothing but what does not hold.
      offline: Never ask the Hub; use its local cache.
    """
    from nufilt_jax.commands.verify import verify

    _require_backend()
    return verify(folder, _console(), _console(stderr=True), quick=quick, json=json, quiet=quiet, offline=offline)


@app.command
def export(
    folder: Folder,
    /,
    *,
    what: str,
    out: Folder,
    step: Whole = None,
    json: Flag = False,
    quiet: Flag = False,
    offline: Flag = False,
) -> int:
    """Write a part of a finished merge for other programs: a task vector, D, the forecast, or the solve as StableHLO.

    Args:
      folder: The output folder of the merge.
      what: tau, delta, forecast or stablehlo.
      out: The file to write, or for stablehlo the folder.
      step: Of which step, counted from 1. Without it, the last; of a forecast, all.
      json: One JSON document on stdout and nothing else there.
      quiet: Nothing but warnings and errors.
      offline: Never ask the Hub; use its local cache.
    """
    from nufilt_jax.commands.export import export

    _require_backend()
    return export(folder, what, out, step, _console(), json=json, quiet=quiet, offline=offline)


@app.command
def extract(model: str, /, arguments: ExtractArguments = EXTRACT_DEFAULTS) -> int:
    """Make a LoRA adapter of what a whole model changed in its base: a fine-tune, or a finished merge.

    Args:
      model: The model: a folder or Hub id, as PATH_OR_HUB[@REV].
      arguments: The options.
    """
    from nufilt_jax.commands.extract import extract

    _require_backend()
    return extract(model, arguments, _console(), _console(stderr=True))


def dispatch(argv: list[str], prog: str) -> int:
    """Parses a command line and does what it says.

    Args:
      argv: the arguments, subcommand first.
      prog: the name shown in help and usage; any other than `nufilt` is `merge` alone, with no subcommand.

    Returns:
      The exit status.

    Raises:
      NufiltError: what the command refuses.
    """
    runner = app
    if prog != app.name[0]:
        runner = App(name=prog, default_command=merge, version=__version__, **_BARE)
    try:
        console = Console(file=cast(TextIO, Output(sys.stdout, is_result=True)))
        result = runner(argv, console=console, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        if isinstance(error.__cause__, UsageError):  # of a converter of ours
            raise error.__cause__ from None
        raise UsageError(Problem("", f"{error} (see {prog} --help)")) from error
    return result if isinstance(result, int) else 0


def _require_backend() -> None:
    from nufilt_jax.commands.backend import require_backend  # which starts JAX

    require_backend()


def _console(*, stderr: bool = False) -> Console:
    output = Output(sys.stderr if stderr else sys.stdout, is_result=not stderr)
    width = None if output.isatty() else WIDE
    return Console(file=cast(TextIO, output), width=width)
