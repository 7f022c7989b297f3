"""The commands and their options: what is parsed, and nothing of what it does."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

from cyclopts import App, CycloptsError, Group, Parameter
from rich.console import Console

from nufilt_jax import __version__
from nufilt_jax.commands.arguments import (
    AddArguments,
    AnalyzeArguments,
    Arguments,
    EvaluateArguments,
    Flag,
    OwnRule,
    PlanArguments,
    PushArguments,
    Whole,
    home_expanded,
)
from nufilt_jax.commands.config_file import options_from_file
from nufilt_jax.commands.extract_arguments import ExtractArguments
from nufilt_jax.commands.interrupt import begins
from nufilt_jax.commands.streams import Output
from nufilt_jax.commands.wrong_usage import wrong_usage
from nufilt_jax.errors import NufiltError, UsageError

NO_ARGUMENTS = Arguments()
ADD_DEFAULTS = AddArguments()
PLAN_DEFAULTS = PlanArguments()
ANALYZE_DEFAULTS = AnalyzeArguments()
EVALUATE_DEFAULTS = EvaluateArguments()
EXTRACT_DEFAULTS = ExtractArguments()
PUSH_DEFAULTS = PushArguments()
WIDE = 1000  # columns of what is no terminal: nothing is wrapped or cut in a file or a pipe
FolderPath = Annotated[Path, Parameter(converter=home_expanded)]
_BARE: dict[str, Any] = {
    "result_action": "return_value",
    "suppress_keyboard_interrupt": False,  # `main` does the rest
    "help_format": "plaintext",
    "config": [options_from_file],
}
_MERGE = Group.create_ordered("Merge")
_LOOK = Group.create_ordered("Look at a merge")
_SHARE = Group.create_ordered("Share")
_PROGRAM = Group.create_ordered("This program")

EXAMPLES = """\
Three that run anywhere, without network:

  nufilt merge --model tiny       # built-in models: merge, measure, compare
  nufilt plan --model tiny        # what a merge would do, and write nothing
  nufilt init                     # a commented merge.toml, to fill in and merge

nufilt COMMAND --help tells a command's options."""

app = App(
    name="nufilt",
    version=__version__,
    help="Data-free continual model merging at compiled speed (arXiv:2509.21413v2).",
    help_epilogue=EXAMPLES,
    **_BARE,
)
app.register_install_completion_command(help="Completion of commands and options for your shell.", group=_PROGRAM)
for _flag in ("--help", "--version"):
    app[_flag].group = (_PROGRAM,)
_QUIET_END: dict[str, Any] = {"help_epilogue": ""}  # the examples are the program's, not each command's


@app.command(group=_MERGE, sort_key=1, **_QUIET_END)
def merge(arguments: Arguments = NO_ARGUMENTS) -> int:
    """Merge fine-tuned models into one, one after another, without data.

    The same command again resumes an interrupted merge.
    """
    if arguments.method is not None and arguments.method.partition("=")[0] == "help":
        from nufilt_jax.commands.method_help import show_methods

        return show_methods(arguments.method, _console(), as_json=arguments.json)
    begins(goes_on=not arguments.plan)
    # A plan needs no device, unless it is to count them, and processes must find each other before any is used.
    if arguments.distributed and not arguments.plan:
        from nufilt_jax.commands.watched import worked_elsewhere

        if (status := worked_elsewhere()) is not None:
            return status
    with _shown_loading(is_quiet=arguments.quiet or arguments.json or arguments.verbose):
        counts = arguments.devices not in (None, "1")
        if (counts or not arguments.plan) and not arguments.distributed:
            _require_backend()
        from nufilt_jax.commands.merge import execute

    return execute(arguments, _console(), _console(stderr=True))


@app.command(group=_MERGE, sort_key=2, **_QUIET_END)
def add(folder: FolderPath, /, arguments: AddArguments = ADD_DEFAULTS) -> int:
    """Merge one more task into a finished or interrupted merge.

    Base, earlier tasks and all settings are those of the merge.

    Args:
      folder: The output folder of the merge.
      arguments: The options of merge.
    """
    return merge(Arguments(**vars(arguments), add=folder))


@app.command(group=_MERGE, sort_key=3, **_QUIET_END)
def plan(arguments: PlanArguments = PLAN_DEFAULTS) -> int:
    """Say what a merge would do, from headers alone, and write nothing."""
    return merge(Arguments(**vars(arguments), plan=True))


@app.command(group=_MERGE, sort_key=4, **_QUIET_END)
def init(path: FolderPath = Path("merge.toml"), /) -> int:
    """Write a commented configuration file, for merge --config.

    Args:
      path: The file to write; none is overwritten.
    """
    from nufilt_jax.commands.init import write_template

    return write_template(path, _console())


@app.command(group=_LOOK, **_QUIET_END)
def evaluate(folder: FolderPath, /, arguments: EvaluateArguments = EVALUATE_DEFAULTS) -> int:
    """Measure a merged model, or any other, on its tasks.

    Writes evaluation.json into its folder.

    Args:
      folder: The output folder of the merge, or a model folder.
      arguments: The options.
    """
    with _shown_loading(is_quiet=arguments.quiet or arguments.json):
        from nufilt_jax.commands.evaluate import evaluate

        _require_backend()
    return evaluate(folder, arguments, _console(), _console(stderr=True))


@app.command(group=_LOOK, **_QUIET_END)
def analyze(folder: FolderPath, /, arguments: AnalyzeArguments = ANALYZE_DEFAULTS) -> int:
    """Say what a merge did, in numbers, pictures and one HTML page.

    All of it is written into its folder.

    Args:
      folder: The output folder of the merge.
      arguments: The options.
    """
    with _shown_loading(is_quiet=arguments.quiet or arguments.json):
        from nufilt_jax.commands.analyze import analyze

        _require_backend()
    return analyze(folder, arguments, _console(), _console(stderr=True))


@app.command(group=_LOOK, **_QUIET_END)
def verify(
    folder: FolderPath,
    /,
    *,
    quick: Flag = False,
    method: OwnRule = None,
    json: Flag = False,
    quiet: Flag = False,
    offline: Flag = False,
) -> int:
    """Check a finished merge against its recipe: inputs and files by their hashes, and every number by merging again.

    Args:
      folder: The output folder of the merge.
      quick: Hash inputs and outputs alone, and do not merge again.
      method: The rule, if it is the user's own.
      json: One JSON document on stdout and nothing else there.
      quiet: Nothing but what does not hold.
      offline: Never ask the Hub; use its local cache.
    """
    with _shown_loading(is_quiet=quiet or json):
        from nufilt_jax.commands.verify import verify

        _require_backend()
    return verify(folder, _console(), _console(stderr=True), quick=quick, json=json, quiet=quiet, offline=offline)


@app.command(group=_SHARE, **_QUIET_END)
def export(
    folder: FolderPath,
    /,
    *,
    what: str,
    out: FolderPath,
    step: Whole = None,
    method: OwnRule = None,
    json: Flag = False,
    quiet: Flag = False,
    offline: Flag = False,
) -> int:
    """Write a part of a finished merge for other programs: a task vector, D, the forecast, or the solve as StableHLO.

    Args:
      folder: The output folder of the merge.
      what: tau, delta, forecast or stablehlo.
      out: The file to write, or for stablehlo the folder.
      step: Of which step, counted from 1. Without it, the last; of a forecast, all. D is kept of the last alone.
      method: The rule, if it is the user's own.
      json: One JSON document on stdout and nothing else there.
      quiet: Nothing but warnings and errors.
      offline: Never ask the Hub; use its local cache.
    """
    with _shown_loading(is_quiet=quiet or json):
        from nufilt_jax.commands.export import export

        _require_backend()
    return export(folder, what, out, step, _console(), json=json, quiet=quiet, offline=offline)


@app.command(group=_MERGE, **_QUIET_END)
def extract(model: str, /, arguments: ExtractArguments = EXTRACT_DEFAULTS) -> int:
    """Make a LoRA adapter of what a whole model changed in its base: a fine-tune, or a finished merge.

    Args:
      model: The model: a folder or Hub id, as PATH_OR_HUB[@REV].
      arguments: The options.
    """
    with _shown_loading(is_quiet=arguments.quiet or arguments.json):
        from nufilt_jax.commands.extract import extract

        _require_backend()
    return extract(model, arguments, _console(), _console(stderr=True))


@app.command(group=_SHARE, **_QUIET_END)
def push(folder: FolderPath, repo: str, /, arguments: PushArguments = PUSH_DEFAULTS) -> int:
    """Upload a merged model to the Hugging Face Hub.

    Log in with: hf auth login. No token is read or kept here.

    Args:
      folder: The output folder of the merge.
      repo: Where to, as USER/NAME; it is made if there is none.
      arguments: The options.
    """
    from nufilt_jax.commands.push import push

    return push(folder, repo, arguments, _console(), _console(stderr=True))


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
    begins(goes_on=False)  # all but merging
    try:
        console = Console(file=cast(TextIO, Output(sys.stdout, is_result=True)))
        result = runner(argv, console=console, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        if isinstance(error.__cause__, NufiltError):  # of a converter of ours
            raise error.__cause__ from None
        raise UsageError(wrong_usage(error, prog)) from error
    return result if isinstance(result, int) else 0


@contextlib.contextmanager
def _shown_loading(*, is_quiet: bool) -> Iterator[None]:
    """Says on a terminal that something goes on while libraries are loaded, which takes a second or more."""
    console = _console(stderr=True)
    with contextlib.nullcontext() if is_quiet or not console.is_terminal else console.status("loading"):
        yield


def _require_backend() -> None:
    from nufilt_jax.commands.backend import require_backend  # which starts JAX

    require_backend()


def _console(*, stderr: bool = False) -> Console:
    output = Output(sys.stderr if stderr else sys.stdout, is_result=not stderr)
    width = None if output.isatty() else WIDE
    return Console(file=cast(TextIO, output), width=width)
