"""The command line: `nufilt merge|add|plan|evaluate|analyze` and `python -m nufilt_jax.merge`.

Exit status: 0 done; 1 a problem of the input, one line each on stderr; 2 wrong usage; 130 interrupted.
"""

import os
import sys
from collections.abc import Iterable

from nufilt_jax.errors import NufiltError, Problem, UsageError
from nufilt_jax.pipeline.interrupt import INTERRUPTED, MESSAGE, orderly_interrupts


def main(argv: list[str] | None = None, prog: str = "nufilt") -> int:
    """Runs a command line and returns the exit status.

    Args:
      argv: the arguments, subcommand first; None for those of this process.
      prog: the name shown in help and usage; any other than `nufilt` is `merge` alone, with no subcommand.
    """
    _prepare_process()
    try:
        with orderly_interrupts():
            from nufilt_jax.pipeline.app import dispatch

            return dispatch(sys.argv[1:] if argv is None else argv, prog)
    except NufiltError as error:
        return _refuse(error.problems, 2 if isinstance(error, UsageError) else 1)
    except OSError as error:
        return _refuse([Problem(str(error.filename or "system"), error.strerror or str(error))], 1)
    except MemoryError:
        return _refuse([Problem("memory", "is exhausted", "close other programs, or use a larger machine")], 1)
    except KeyboardInterrupt:
        sys.stderr.write(MESSAGE)
        return INTERRUPTED


def _prepare_process() -> None:
    """What only a program may set, and a library may not: memory preallocation and the compile cache."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it says on stderr that it found no torch
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("NUFILT_CACHE") or os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nufilt_jax"
        )
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(cache, "xla")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _refuse(problems: Iterable[Problem], status: int) -> int:
    """Prints a line per problem on stderr, whatever the terminal's width."""
    for problem in problems:
        sys.stderr.write(f"nufilt: {problem}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
