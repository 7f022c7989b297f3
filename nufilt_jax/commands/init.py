"""The command `init`: a configuration file to fill in, written from the options themselves."""

import dataclasses
import textwrap
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from cyclopts import Parameter
from docstring_parser import parse
from rich.console import Console

from nufilt_jax.commands import text
from nufilt_jax.commands.arguments import Arguments
from nufilt_jax.commands.config_file import NOT_IN_FILES
from nufilt_jax.errors import ConfigError, OutputError, Problem

_HEAD = """\
# A merge by nufilt_jax:  nufilt plan --config {name}, then  nufilt merge --config {name}
# Keys are the names of the options, with _ for -. What stands here can be left out, and a # before a line leaves it
# out: then its value is the default, but where the line says that it is an example. The command line wins over this
# file. Relative paths are relative to the folder of this file.

base = "openai/clip-vit-base-patch32"  # a folder or a Hub id, PATH_OR_HUB[@REV]
out = "merged"

"""
_TASKS = """
# The fine-tuned models, in the order in which they are merged: NAME = "PATH_OR_HUB[@REV]".
[tasks]
stanford-cars = "tanganke/clip-vit-base-patch32_stanford-cars"
gtsrb = "tanganke/clip-vit-base-patch32_gtsrb"

# Settings of the method without an option of their own; nufilt merge --method help=NAME lists them.
[method_args]
"""
_WIDTH = 118
_EXAMPLES = {  # of what has no default, or one that is told in words
    "model": '"tiny"',
    "order": "2",
    "preset_table": "2",
    "data": '"examples"',
    "layers": '"self_attn"',
    "tasks_file": '"tasks.json"',
    "heads_from": '"openai/clip-vit-base-patch32"',
    "limit": "100",
    "dtype": '"float32"',
    "format": '"safetensors"',
    "adapter_out_rank": "16",
    "max_memory": '"8GB"',
}
_TOLD = ("base", "out", "task", "method_args")


def template(name: str = "merge.toml") -> str:
    """The text of the file: every option that a file can give, with what it means and its default or an example."""
    meanings = {entry.arg_name: entry.description or "" for entry in parse(Arguments.__doc__ or "").params}
    lines = [_HEAD.format(name=name)]
    for field in dataclasses.fields(Arguments):
        if field.name not in (*NOT_IN_FILES, *_TOLD):
            meaning = textwrap.wrap(meanings[field.name], _WIDTH, initial_indent="# ", subsequent_indent="# ")
            lines.append("\n".join(meaning) + f"\n# {field.name} = {_example(field)}\n")
    return "".join(lines) + _TASKS


def write_template(path: Path, console: Console) -> int:
    """Writes it, over nothing.

    Raises:
      ConfigError: the name does not end with .toml.
      OutputError: there is such a file, or it cannot be written.
    """
    if path.suffix.lower() != ".toml":
        raise ConfigError(Problem(str(path), "must end with .toml", "yaml and json files have the same keys"))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(template(path.name))
    except FileExistsError:
        raise OutputError(Problem(str(path), "is there already: nothing is overwritten", "name another")) from None
    except OSError as error:
        raise OutputError(Problem(str(path), f"cannot be written: {error.strerror or error}")) from error
    text.show_line(console, f"written: {path}; fill it in, then: nufilt plan --config {path}")
    return 0


def _example(field: dataclasses.Field[Any]) -> str:
    """The option's default as TOML spells it, or an example where there is none."""
    if field.type is bool or (get_origin(field.type) is Annotated and get_args(field.type)[0] is bool):
        return "false"
    shown = shown_default(field.type)
    if field.name in _EXAMPLES:
        return f"{_EXAMPLES[field.name]}  # an example: " + (
            f"the default is {shown}" if shown else "there is no default"
        )
    try:
        float(shown)
    except ValueError:
        return f'"{shown}"'
    return shown


def shown_default(hint: Any) -> str:
    """What the help says of an option left out; empty if it says nothing."""
    notes = [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Parameter)]
    return next((note.show_default for note in notes if isinstance(note.show_default, str)), "")
