"""From options to settings, with every refused value listed."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from nufilt_jax.checkpoints.folders import FORMATS
from nufilt_jax.commands.arguments import Arguments, EvaluateArguments
from nufilt_jax.commands.spelling import SPELLINGS
from nufilt_jax.config import ComputeType, MethodConfig, differing, kinds_of, option, problem
from nufilt_jax.engine.asked import asked_settings, idle_settings, of_writing, one_of
from nufilt_jax.engine.job import EvaluationOptions
from nufilt_jax.errors import ConfigError, NufiltError, Problem, gathering
from nufilt_jax.methods import canonical_name, find, load_own
from nufilt_jax.output.recipe import OF_WRITING, Settings
from nufilt_jax.strict_json import shown

DEFAULT_METHOD = "nufilt"
_COMPUTE_DTYPES: Mapping[str, ComputeType] = {name: name for name in get_args(ComputeType)}
_FLAGS = {option(field.name) for field in dataclasses.fields(Arguments)}


def read_settings(
    arguments: Arguments, preset: Mapping[str, Mapping[str, Any]]
) -> tuple[Settings, list[str], list[Problem]]:
    """Settings from the preset, the options and --method-args, the later ones winning.

    Args:
      arguments: the command line.
      preset: settings by method that the preset changes.

    Returns:
      The settings, with defaults in place of what is refused; warnings; and what is refused.
    """
    problems: list[Problem] = []
    pairs = arguments.method_args
    method = None
    with gathering(problems):
        method = known_method(arguments.method)
    if method is None:
        method, pairs = DEFAULT_METHOD, ()
    config, warnings = _config(method, preset.get(method, {}), arguments.config_flags(), pairs, problems)
    settings = asked_settings(
        method,
        config,
        problems,
        seed=arguments.seed or 0,
        layers=arguments.layers,
        conv=arguments.conv,
        other_params=arguments.other_params,
        output=arguments.output,
        **_of_writing(arguments),
    )
    return settings, warnings, problems


def _of_writing(arguments: Arguments) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in OF_WRITING}


def known_method(asked: str | None) -> str:
    """The name of the method that is asked for; one of the user's own is imported.

    Raises:
      ConfigError: there is none.
    """
    if asked is not None and ":" in asked:
        return load_own(asked).name
    return find(asked or DEFAULT_METHOD).name


def read_evaluation(arguments: EvaluateArguments, problems: list[Problem]) -> EvaluationOptions:
    """How to evaluate; what is refused goes to `problems`, and its default takes its place."""
    limit = arguments.limit
    if limit is not None and limit < 1:
        problems.append(problem("limit", f"must be at least 1, got {limit}"))
        limit = None
    return EvaluationOptions(
        tasks_file=arguments.tasks_file,
        heads_from=arguments.heads_from,
        limit=limit,
        dtype=one_of("dtype", arguments.dtype, _COMPUTE_DTYPES, problems) or "float32",
        offline=arguments.offline,
    )


def continued_settings(arguments: Arguments, settings: Settings, *, is_written: bool) -> tuple[Settings, list[Problem]]:
    """The settings to go on with, and the options that ask for others than a merge has, or are refused in any case.

    Args:
      arguments: the command line.
      settings: of the merge.
      is_written: whether its model is there; if not, it may still be written in another format or type.
    """
    wanted: dict[str, tuple[Any, Any]] = {
        "method": (arguments.method and canonical_name(arguments.method), settings.method),
        "seed": (arguments.seed, settings.seed),
        "layers": (arguments.layers, settings.layers),
        "other_params": (arguments.other_params, settings.other_params),
        "format": (arguments.format and FORMATS.get(arguments.format, arguments.format), settings.format),
        "dtype": (arguments.dtype, settings.dtype),
        "output": (arguments.output, settings.output),
        "adapter_out_rank": (arguments.adapter_out_rank, settings.adapter_out_rank),
        "conv": (arguments.conv or None, settings.conv),
    }
    problems: list[Problem] = []
    if not is_written:
        asked = {
            key: value for key, value in of_writing(problems, **_of_writing(arguments)).items() if value is not None
        }
        settings = dataclasses.replace(settings, **asked)
        wanted = {key: pair for key, pair in wanted.items() if key not in OF_WRITING}
    given = arguments.config_flags() | _parsed(settings.method, arguments.method_args, problems)
    wanted |= {key: (value, getattr(settings.config, key, None)) for key, value in given.items()}
    problems += [
        problem(key, differing(there, here, "in this merge"), "--add takes all settings from the recipe")
        for key, (here, there) in wanted.items()
        if here is not None and here != there
    ]
    return settings, problems


def _config(
    method: str, preset: Mapping[str, Any], flags: Mapping[str, Any], pairs: tuple[str, ...], problems: list[Problem]
) -> tuple[MethodConfig, list[str]]:
    kind = find(method).config
    fields = {field.name for field in dataclasses.fields(kind)}
    idle = ", ".join(option(key) for key in flags if key not in fields)
    warnings = [f"{idle}: no effect: {method} has no such setting"] if idle else []
    given = {key: value for key, value in flags.items() if key in fields} | _parsed(method, pairs, problems)
    try:
        config = kind(**{**preset, **given})
    except ConfigError as error:
        problems += map(_as_given, error.problems)
        return kind(), warnings
    return config, [*warnings, *(str(_as_given(found)) for found in idle_settings(config, given))]


@contextlib.contextmanager
def settings_as_given() -> Iterator[None]:
    """Lets what the block refuses name the options that there are."""
    try:
        yield
    except NufiltError as error:
        told = tuple(map(_as_given, error.problems))
        if told == error.problems:
            raise
        raise type(error)(*told) from error


def _as_given(found: Problem) -> Problem:
    """A problem with a setting that has no option of its own can only come from --method-args."""
    if not found.where.startswith("--") or found.where in _FLAGS:
        return found
    return problem("method_args", f"{found.where.removeprefix('--').replace('-', '_')} {found.what}", found.fix)


def _parsed(method: str, pairs: tuple[str, ...], problems: list[Problem]) -> dict[str, Any]:
    """KEY=VALUE pairs, each value read as its field's type."""
    kinds = kinds_of(find(method).config)
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.replace("-", "_")
        if not equals:
            problems.append(problem("method_args", f"{pair!r} is not of the form KEY=VALUE"))
        elif key not in kinds:
            known = f"its settings: {', '.join(kinds)}" if kinds else "it has none"
            problems.append(problem("method_args", f"{method} has no setting {key!r}", known))
        else:
            try:
                values[key] = _read(kinds[key], text)
            except ValueError:
                wanted = SPELLINGS[kinds[key]]
                problems.append(problem("method_args", f"{key} must be {wanted}, got {shown(text)}"))
    return values


def _read(kind: object, text: str) -> int | float | str:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if kind is int:
        return int(text)
    return float(text) if kind is float else text
