"""The configuration file: options of a command from toml, yaml or json, a merge's recipe, or a mergekit file.

Read by cyclopts' own rule: a value of the file counts where the command line says nothing.
"""

import dataclasses
import difflib
import os
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict

from nufilt_jax.commands.arguments import OF_ONE_PROCESS, Arguments, EvaluateArguments
from nufilt_jax.commands.spelling import SPELLINGS, spelt
from nufilt_jax.config import option
from nufilt_jax.errors import ConfigError, Problem, raise_all
from nufilt_jax.strict_json import JsonError, parse_object, shown

Values = dict[str, Any]

TASK_TABLE = "tasks"  # the table; the option is --task
# Of one run or one process, not of a merge.
NOT_IN_FILES = ("config", "json", "quiet", "verbose", "plan", "add")
NOT_IN_FILES += OF_ONE_PROCESS
_NUMBERS_OR_WORDS = {"order": int, "devices": int, "max_memory": float}
_PLACES = ("out", "data", "tasks_file")
_MODELS = ("base", "heads_from")
_SHARED = ("tasks_file", "heads_from", "limit", "offline")  # that mean the same for merge and evaluate


def options_from_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Gives a command's arguments what the file of `--config` says and the command line does not: a cyclopts config.

    Raises:
      ConfigError: the file cannot be read, or says something that is no option; all of it at once.
    """
    file = _asked(arguments, "--config")
    if file is None:
        return
    path = Path(os.path.expanduser(file))
    _know_own_rule(arguments)
    values = read_options(path, "evaluate" if commands[-1:] == ("evaluate",) else "merge")
    if _left_out(values, _asked(arguments, "--method")):
        del values["method_args"]
    _keep_settings(arguments, values.get("method_args", ()))
    if _asked(arguments, "--output") not in (None, "adapter"):  # of which alone the file says how large
        values.pop("adapter_out_rank", None)
    Dict(values, source=str(path), use_commands_as_keys=False)(app, commands, arguments)


def warnings_of_file(path: Path | None, method: str | None) -> tuple[str, ...]:
    """What a user should know of the file of `--config`: the settings in it that are of another method.

    Args:
      path: of the file; None if there is none.
      method: as it is asked for.
    """
    values = {} if path is None else read_options(path)
    names = ", ".join(_left_out(values, method))
    return (f"--config: no effect: {names}: {method} is not the method of the file",) if names else ()


def _left_out(values: Values, asked: str | None) -> list[str]:
    """The file's settings of a method that is not the one asked for."""
    pairs = values.get("method_args", ())
    return [_key(pair) for pair in pairs] if pairs and _is_other_method(asked, values.get("method")) else []


def _keep_settings(arguments: ArgumentCollection, pairs: Sequence[str]) -> None:
    """Puts the file's --method-args beside those of the command line, which would hide them all: setting by setting."""
    given = next((argument.tokens for argument in arguments if "--method-args" in argument.names), [])
    if not given or not pairs:
        return
    said = {_key(token.value) for token in given}
    given += [given[-1].evolve(value=pair) for pair in pairs if _key(pair) not in said]


def _key(pair: str) -> str:
    return pair.partition("=")[0].replace("-", "_")


def _is_other_method(asked: str | None, method: str | None) -> bool:
    from nufilt_jax.commands.settings import DEFAULT_METHOD
    from nufilt_jax.methods import canonical_name

    return asked is not None and canonical_name(asked) != canonical_name(method or DEFAULT_METHOD)


def _asked(arguments: ArgumentCollection, option: str) -> str | None:
    """What the command line says of an option."""
    return next((a.tokens[-1].value for a in arguments if option in a.names and a.tokens), None)


def _know_own_rule(arguments: ArgumentCollection) -> None:
    """Imports the rule that `--method MODULE:RULE` names on the command line; a recipe imports nothing."""
    asked = _asked(arguments, "--method")
    if asked and ":" in asked and not asked.startswith("help="):
        from nufilt_jax.methods import load_own

        load_own(asked)


def read_options(path: Path, command: str = "merge") -> Values:
    """The options that a configuration file gives, as they are spelt on the command line.

    Args:
      path: ends with .toml, .yaml, .yml or .json; relative paths in it are relative to its folder.
      command: merge or evaluate; evaluate takes from a file for merge what means the same to it.

    Returns:
      Values by name of the option, with `_` for `-`.

    Raises:
      ConfigError: as for `options_from_file`.
    """
    document = _parsed(path)
    if "merge_method" in document:
        from nufilt_jax.commands.mergekit import options_of_mergekit

        document = options_of_mergekit(document, path)
    elif path.suffix.lower() == ".json":
        from nufilt_jax.commands.recipe_file import is_recipe, options_of_recipe

        document = options_of_recipe(document, path) if is_recipe(document) else document
    is_of_merge = command == "merge" or not document.keys().isdisjoint(("base", "model", "method"))
    known = _kinds(Arguments if is_of_merge else EvaluateArguments)
    problems = [*_problems(document, known, path)]
    raise_all(ConfigError, problems)
    values = _values({key: value for key, value in document.items() if value is not None}, path.absolute().parent)
    if command == "merge":
        return values
    names = [pair.partition("=")[0] for pair in values.get("task", ())]
    kept = {key: value for key, value in values.items() if key in _SHARED} if is_of_merge else values
    return kept | ({"task": names} if names else {})


def _parsed(path: Path) -> Values:
    readers: dict[str, Callable[[bytes], Any]] = {".toml": _toml, ".json": parse_object, ".yaml": _yaml, ".yml": _yaml}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            Problem(str(path), "is no configuration file", "give one that ends with .toml, .yaml or .json")
        )
    try:
        content = reader(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(Problem(str(path), "there is no such file", "nufilt init writes one to fill in")) from None
    except OSError as error:
        raise ConfigError(Problem(str(path), f"cannot be read: {error.strerror or error}")) from error
    except JsonError as error:
        raise ConfigError(Problem(str(path), str(error), error.fix)) from error
    except (ValueError, RecursionError) as error:
        kind = {".toml": "TOML", ".json": "JSON"}.get(path.suffix.lower(), "YAML")
        raise ConfigError(Problem(str(path), f"is not {kind}: {error}")) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(Problem(str(path), "holds no table of options", "nufilt init writes one to fill in"))
    return content


def _toml(text: bytes) -> Any:
    return tomllib.loads(text.decode("utf-8-sig"))


def _yaml(text: bytes) -> Any:
    import yaml

    class _Loader(yaml.SafeLoader):
        """Refuses a key that stands twice, of which YAML's own would take the last."""

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        pairs = [
            (loader.construct_object(key, deep=True), loader.construct_object(value, deep=True))
            for key, value in node.value
        ]
        try:
            content = dict(pairs)
        except TypeError:
            raise JsonError("has a key that is no text") from None
        if len(content) < len(pairs):
            names = [key for key, _ in pairs]
            raise JsonError(f"has the key {next(shown(key) for key in names if names.count(key) > 1)} twice")
        return content

    _Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: it makes numbers, texts, lists and tables, and no other object
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _kinds(options: type) -> dict[str, Any]:
    """What each option's value is: bool, int, float, str, Path or tuple."""
    return {field.name: _kind(field.type) for field in dataclasses.fields(options) if field.name not in NOT_IN_FILES}


def _kind(hint: Any) -> Any:
    while get_origin(hint) is Annotated or get_origin(hint) in (types.UnionType, Union):
        hint = get_args(hint)[0]
    return get_origin(hint) or hint


def _problems(document: Mapping[str, Any], known: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    for key, value in document.items():
        if key in NOT_IN_FILES:
            fix = f"say {option(key)} there" if key != "config" else "give one file"
            yield Problem(str(path), "belongs to one run: it is for the command line alone", fix, key)
        elif key not in known and key != TASK_TABLE:
            near = difflib.get_close_matches(key, [TASK_TABLE, *known], 1, 0.6)
            fix = f"did you mean {near[0]}?" if near else "its keys are the names of options, with _ for -"
            yield Problem(str(path), "is no option", fix, key)
        elif value is not None and (expected := _fault(key, value, known.get(key))):
            yield Problem(str(path), f"must be {expected}, got {shown(value)}", tensor=key)
    if {"task", TASK_TABLE} <= document.keys():
        yield Problem(str(path), "says the same as the table tasks", "leave out one of them", "task")


def _fault(key: str, value: Any, kind: Any) -> str:
    """What a value must be and is not; empty if all is well."""
    if key == TASK_TABLE:
        is_table = isinstance(value, dict) and all(isinstance(x, str) for part in value.items() for x in part)
        names = isinstance(value, list) and all(isinstance(x, str) for x in value)
        return "" if is_table or names else "a table NAME = MODEL, in order"
    if key == "method_args":
        is_plain = isinstance(value, dict) and not any(isinstance(x, dict | list) for x in value.values())
        is_pairs = isinstance(value, list) and all(isinstance(x, str) for x in value)
        return "" if is_plain or is_pairs else "a table of settings"
    if kind is tuple:
        return "" if isinstance(value, list) and all(isinstance(x, str) for x in value) else "a list of texts"
    if kind is bool:
        return "" if isinstance(value, bool) else SPELLINGS[bool]
    if kind in (int, float):
        return "" if _reads_as(kind, value) else SPELLINGS[kind]
    # A number too, where an option is a number or a word.
    is_plain = isinstance(value, str) or (key in _NUMBERS_OR_WORDS and _reads_as(_NUMBERS_OR_WORDS[key], value))
    return "" if is_plain else "a text"


def _reads_as(kind: type, value: Any) -> bool:
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        return False
    try:
        kind(value)  # of a text too: YAML reads 1e-3 as one
    except (TypeError, ValueError):
        return False
    return True


def _values(document: Values, folder: Path) -> Values:
    """Checked values as on the command line, paths found from the file's folder."""
    values = {key: value for key, value in document.items() if key not in (TASK_TABLE, "method_args")}
    values |= {key: str(folder / os.path.expanduser(values[key])) for key in _PLACES if key in values}
    values |= {key: located(values[key], folder) for key in _MODELS if key in values}
    tasks: Any = document.get(TASK_TABLE, {})  # or as a list, what the option takes
    pairs = [text.partition("=") for text in [*values.pop("task", ()), *(tasks if isinstance(tasks, list) else ())]]
    if isinstance(tasks, dict):
        pairs += [(name, "=", source) for name, source in tasks.items()]
    found = [name + sign + (located(source, folder) if source else "") for name, sign, source in pairs]
    values |= {"task": found} if found else {}
    settings: Any = document.get("method_args", {})
    options = _kinds(Arguments)
    if isinstance(settings, dict):
        said = ((key, value) for key, value in settings.items() if value is not None or key not in options)
        settings = [f"{key}={spelt(value)}" for key, value in said]
    # An option's own name takes the option: what the command line says then wins.
    own = [pair for pair in settings if "=" in pair and _key(pair) in options]
    values |= {_key(pair): pair.partition("=")[2] for pair in own}
    others = [pair for pair in settings if pair not in own]
    return values | ({"method_args": others} if others else {})


def located(source: str, folder: Path) -> str:
    """A model's source as seen from anywhere: what is a folder beside the file, or says that it is one, is a path."""
    text = os.path.expanduser(source)
    if text and (text.startswith(("./", "../", "/")) or (folder / text).is_dir()):
        return os.path.normpath(folder / text)
    return source
