"""Finding all problems of a command before the first one is reported."""

import contextlib
from collections.abc import Iterator

from nufilt_jax.errors import NufiltError, Problem, UsageError


@contextlib.contextmanager
def gathering(problems: list[Problem]) -> Iterator[None]:
    """Adds what the block refuses to `problems` instead of ending the search for more.

    Wrong usage is not gathered: what the command means is not known then.
    """
    try:
        yield
    except UsageError:
        raise
    except NufiltError as error:
        problems += error.problems
