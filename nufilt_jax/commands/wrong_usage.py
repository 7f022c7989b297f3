"""A command line that does not parse, in this program's words and with the help that is meant."""

import dataclasses
import itertools

from cyclopts import CycloptsError, MissingArgumentError, UnknownOptionError

from nufilt_jax.commands.arguments import Arguments
from nufilt_jax.config import option
from nufilt_jax.errors import Problem

_OF_MERGE = {option(field.name) for field in dataclasses.fields(Arguments)}


def wrong_usage(error: CycloptsError, prog: str) -> Problem:
    """What is wrong with a command line, and the command whose help tells more."""
    command = " ".join(error.command_chain or ())
    see = f"see {prog} {command} --help" if command else f"see {prog} --help"
    if isinstance(error, UnknownOptionError):
        name = (error.token.keyword or error.token.value or "").partition("=")[0]
        if name == "--config":
            fix = "base, earlier tasks and settings are those of the merge" if command == "add" else see
            return Problem(name, f"{command} takes no configuration file", fix)
        if name in _OF_MERGE:  # which is no slip of the pen
            return Problem(name, f"is an option of merge, and not of {command}", see)
    if isinstance(error, MissingArgumentError) and (text := _taken_for_an_option(error)):
        keyword = error.keyword or ""
        return Problem(keyword, f"{text} begins as an option does", f"say {keyword}={text}")
    return Problem("", f"{error} ({see})")


def _taken_for_an_option(error: MissingArgumentError) -> str:
    """What stands behind an option that wants a value, and begins with one dash; empty if that is not what is wrong."""
    tokens = error.root_input_tokens or []
    behind = [text for name, text in itertools.pairwise(tokens) if name == error.keyword]
    text = behind[-1] if behind else ""
    return text if text.startswith("-") and not text.startswith("--") and len(text) > 2 else ""
