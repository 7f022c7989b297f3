"""The command line, `nufilt merge|add|plan|init|extract|evaluate|analyze|verify|export|push`.

`python -m nufilt_jax.merge` is `nufilt merge`.

Exit status: 0 done; 1 a problem of the input, one line each on stderr; 2 wrong usage; 130 interrupted (143 by
SIGTERM).
"""

import sys
from collections.abc import Iterable

from nufilt_jax.commands.failures import unforeseen
from nufilt_jax.commands.interrupt import interruption, orderly_interrupts
from nufilt_jax.commands.process import prepare_process
from nufilt_jax.commands.streams import Output, ReaderGoneError, escaping
from nufilt_jax.commands.watched import leave
from nufilt_jax.errors import NufiltError, Problem, UsageError, summarised


def main(argv: list[str] | None = None, prog: str = "nufilt") -> int:
    """Runs a command line and returns the exit status.

    Args:
      argv: the arguments, subcommand first; None for those of this process.
      prog: the name shown in help and usage; any other than `nufilt` is `merge` alone, with no subcommand.
    """
    prepare_process()
    with escaping(sys.stdout, sys.stderr):
        return leave(_run(sys.argv[1:] if argv is None else argv, prog), is_own=argv is None)


def _run(argv: list[str], prog: str) -> int:
    try:
        with orderly_interrupts():
            from nufilt_jax.commands.app import dispatch

            status = dispatch(argv, prog)
        Output(sys.stdout, is_result=True).flush()
        return status
    except ReaderGoneError:
        return 0
    except NufiltError as error:
        return _refuse(error.problems, 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt as error:
        status, message = interruption(error)
        Output(sys.stderr, is_result=False).write(message)
        return status
    except Exception as error:  # a traceback is no message; commands that write keep it beside their output
        return _refuse([unforeseen(error)], 1)


def _refuse(problems: Iterable[Problem], status: int) -> int:
    """Prints a line per problem on stderr, whatever the terminal's width."""
    stderr = Output(sys.stderr, is_result=False)
    for problem in summarised(list(problems)):
        stderr.write(f"nufilt: {problem}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
