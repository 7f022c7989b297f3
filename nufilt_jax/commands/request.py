"""From the command line to a job: which models, in which order, with which settings, to which folder."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from nufilt_jax.checkpoints import open_checkpoint, parse_source
from nufilt_jax.commands import watched
from nufilt_jax.commands.arguments import Arguments, EvaluateArguments
from nufilt_jax.commands.config_file import warnings_of_file
from nufilt_jax.commands.recipe_file import promised
from nufilt_jax.commands.settings import DEFAULT_METHOD, continued_settings, read_evaluation, read_settings
from nufilt_jax.config import option, problem
from nufilt_jax.engine.asked import asked_memory, idle_data, is_task_name
from nufilt_jax.engine.devices import count_devices
from nufilt_jax.engine.hosts import Cluster
from nufilt_jax.engine.job import EvaluationOptions, Job, recorded_in
from nufilt_jax.errors import ConfigError, NufiltError, OutputError, Problem, UsageError, gathering, raise_all
from nufilt_jax.methods import RULES, canonical_name, load_own
from nufilt_jax.output.place import OutputPlace
from nufilt_jax.output.recipe import VERSION, Model
from nufilt_jax.presets import (
    CLIP_BASES,
    FLAN_T5,
    LLAVA,
    TINY,
    Preset,
    check_model,
    clip_preset,
    flan_t5_preset,
    llava_preset,
    shuffled,
)
from nufilt_jax.strict_json import shown

_NOT_WITH_ADD = ("model", "base", "group", "order", "preset_table", "out")
_MOST_DIGITS = 18  # of an order
_NOT_WITH_MODEL = ("base", "task")


def check_usage(arguments: Arguments) -> None:
    """Refuses options that do not add up to a command.

    Raises:
      UsageError: options that exclude each other, or that are missing.
    """
    if arguments.add is not None:
        fix = "--add takes all but new tasks from the recipe: leave it out"
        problems = [problem(name, "does not go with --add", fix) for name in _given(arguments, _NOT_WITH_ADD)]
    elif arguments.model is not None:
        fix = "a preset brings its own base and tasks: leave it out"
        excluded = ("base",) if arguments.model == LLAVA else _NOT_WITH_MODEL
        problems = [problem(name, "does not go with --model", fix) for name in _given(arguments, excluded)]
        if arguments.model == LLAVA and not arguments.task:
            problems.append(problem("task", "missing", f"{LLAVA} brings its base alone: give --task NAME=PATH_OR_HUB"))
    else:
        needed = ("base", "task") if arguments.plan else ("base", "task", "out")
        missing = [option(name) for name in needed if not getattr(arguments, name)]
        fix = "give --model, or --base, --task NAME=PATH_OR_HUB[@REV] and --out, or --add"
        problems = [Problem(", ".join(missing), "missing", fix)] if missing else []
        if not missing:
            alone = _given(arguments, ("group", "preset_table"))
            problems += [problem(name, "belongs to --model", "leave it out") for name in alone]
    if not _is_evaluated(arguments):
        given = _given(arguments, ("tasks_file", "heads_from", "limit"))
        problems += [problem(name, "belongs to --evaluate", "add that, or leave it out") for name in given]
    problems += _cluster_problems(arguments)
    fields = (field.name for field in dataclasses.fields(arguments) if field.name != "base")  # which is missing then
    problems += [problem(name, "is empty", "leave it out") for name in fields if getattr(arguments, name) == ""]
    pairs = [(text, *text.partition("=")) for text in arguments.task]
    bad = [text for text, name, _, source in pairs if not (is_task_name(name) and source)]
    problems += [problem("task", f"{text!r} is not of the form NAME=PATH_OR_HUB[@REV]") for text in bad]
    raise_all(UsageError, problems)


def _cluster_problems(arguments: Arguments) -> list[Problem]:
    names = ("coordinator", "processes", "process")
    if not arguments.distributed:
        return [
            problem(name, "belongs to --distributed", "add that, or leave it out") for name in _given(arguments, names)
        ]
    problems = []
    if _is_evaluated(arguments):
        what = "does not go with an evaluation after every step, for which one process must have the whole model"
        problems.append(problem("distributed", what, "leave it out, or evaluate the merged model: nufilt evaluate"))
    if arguments.processes is not None and arguments.processes < 1:
        problems.append(problem("processes", f"must be at least 1, got {arguments.processes}"))
    elif arguments.process is not None and not 0 <= arguments.process < (arguments.processes or arguments.process + 1):
        problems.append(problem("process", f"must be at least 0 and below --processes, got {arguments.process}"))
    return problems


def cluster_of(arguments: Arguments) -> Cluster | None:
    """How the processes of a run find each other; None for one process alone."""
    given = Cluster(arguments.coordinator, arguments.processes, arguments.process, watched.WAITING)
    return given if arguments.distributed else None


def _is_evaluated(arguments: Arguments) -> bool:
    """Whether the merged model is evaluated after every step; the built-in one always is."""
    return arguments.evaluate or arguments.model == TINY


def _evaluation(arguments: Arguments, problems: list[Problem]) -> EvaluationOptions | None:
    if not _is_evaluated(arguments):
        return None
    names = ("tasks_file", "heads_from", "limit", "offline")
    return read_evaluation(EvaluateArguments(**{name: getattr(arguments, name) for name in names}), problems)


def _given(arguments: Arguments, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if getattr(arguments, name) not in (None, ())]


def new_job(arguments: Arguments, zoo: Path | None = None) -> Job:
    """A merge from the start, or the same command again.

    Args:
      arguments: the command line, checked by `check_usage`.
      zoo: where to write the built-in checkpoints if they are asked for; None for the user's cache.

    Raises:
      NufiltError: there is no such preset.
    """
    problems: list[Problem] = []
    order = None
    with gathering(problems):
        order = _order(arguments.order)
    preset = None
    with gathering(problems):
        preset = _preset(arguments, order, zoo)
    settings, warnings, refused = read_settings(arguments, preset.settings if preset else {})
    problems = refused + problems
    evaluation = _evaluation(arguments, problems)
    if preset is None:
        raise NufiltError(*problems)
    recorded = promised(arguments.config)
    base, *sources = (
        dataclasses.replace(model, sha256=known.sha256)
        if (known := recorded.get((model.source, model.revision)))
        else model
        for model in (Model("base", *parse_source(preset.base)), *_sources(preset.tasks))
    )
    return Job(
        base=base,
        sources=tuple(sources),
        settings=settings,
        out=arguments.out or _default_out(arguments, order),
        data=arguments.data or preset.data,
        evaluation=evaluation,
        max_memory=asked_memory(arguments.max_memory, problems),
        devices=_devices(arguments, problems),
        strict=arguments.strict,
        warnings=(
            *warnings_of_file(arguments.config, arguments.method),
            *warnings,
            *idle_data(arguments.data, settings.method),
        ),
        problems=tuple(problems),
    )


def continued_job(arguments: Arguments, place: OutputPlace) -> Job:
    """The merge that stands in, or is under way beside, the folder of --add, with the new tasks behind it.

    Raises:
      NufiltError: there is none, or its recipe is damaged.
    """
    if arguments.method is not None and ":" in arguments.method:
        load_own(arguments.method)  # before the recipe names it
    recorded = recorded_in(place)
    if recorded is None:
        fix = "start one with --base, --task and --out"
        raise OutputError(Problem(str(place.out), "holds no merge to continue", fix))
    recipe = recorded.recipe
    if recipe.version < VERSION:
        what = "is a merge of a development version of nufilt_jax 0.1, whose state this version cannot read"
        raise OutputError(Problem(str(recorded.folder), what, "merge again into another folder, or with --config"))
    settings, problems = continued_settings(arguments, recipe.settings, is_written=recorded.is_written)
    evaluation = _evaluation(arguments, problems)
    new = _sources(_tasks(arguments))
    n_known = _n_known(recipe.task_names, [source.name for source in new])
    if not arguments.plan:  # which reads no weights, and so cannot hash them
        for known, again in zip(recipe.tasks[len(recipe.tasks) - n_known :], new, strict=False):
            with gathering(problems):
                problems += known.changes(_sha256(again, arguments), again.source, recorded.folder)
    return Job(
        base=recipe.base,
        sources=recipe.tasks + new[n_known:],
        settings=settings,
        out=place.out,
        data=arguments.data,
        evaluation=evaluation,
        max_memory=asked_memory(arguments.max_memory, problems),
        devices=_devices(arguments, problems),
        strict=arguments.strict,
        continues=recorded,
        warnings=idle_data(arguments.data, settings.method),
        problems=tuple(problems),
    )


def _n_known(recorded: list[str], new: list[str]) -> int:
    """How many of the new tasks are the last ones there already, so that the same --add again adds nothing."""
    most = min(len(recorded), len(new))
    return next((n for n in range(most, 0, -1) if recorded[-n:] == new[:n]), 0)


def _sha256(model: Model, arguments: Arguments) -> dict[str, str]:
    model_folder = open_checkpoint(model.source, revision=model.revision, offline=arguments.offline, adapters=True)
    return model_folder.sha256()


def _devices(arguments: Arguments, problems: list[Problem]) -> int:
    n_devices = 1
    with gathering(problems):
        n_devices = count_devices(arguments.devices)
    return n_devices


def _preset(arguments: Arguments, order: int | None, zoo: Path | None) -> Preset:
    if arguments.model is None:
        return Preset(cast(str, arguments.base), shuffled(_tasks(arguments), order or 0), {})
    check_model(arguments.model)
    if arguments.model != FLAN_T5 and arguments.preset_table is not None:
        raise ConfigError(problem("preset_table", f"belongs to --model {FLAN_T5}", "leave it out"))
    if arguments.model in CLIP_BASES:
        return clip_preset(arguments.model, arguments.group, order)
    if arguments.group is not None:
        raise ConfigError(problem("group", f"{arguments.model} has one group of tasks only", "leave it out"))
    if arguments.model == FLAN_T5:
        return flan_t5_preset(order, arguments.preset_table)
    if arguments.model == LLAVA:
        return llava_preset(_tasks(arguments), order)
    from nufilt_jax.engine.tiny import tiny_preset  # with models and training, which no other merge needs

    return tiny_preset(order, zoo, examples=_needs_data(arguments.method))


def _needs_data(method: str | None) -> bool:
    rule = RULES.get(canonical_name(method or DEFAULT_METHOD))
    return rule is not None and rule.needs_data


def _default_out(arguments: Arguments, order: int | None) -> Path | None:
    """The folder's name says what a preset leaves open: `nufilt-vit-b32-8-order1`, `nufilt-tiny`."""
    if arguments.model is None:
        return None
    parts = [arguments.method or DEFAULT_METHOD, arguments.model]
    if arguments.model in CLIP_BASES:
        parts.append(str(arguments.group or 8))
    if arguments.preset_table is not None:
        parts.append(f"table{arguments.preset_table}")
    if arguments.model in CLIP_BASES or order is not None:
        parts.append("given" if order == 0 else f"order{order or 1}")
    return Path("-".join(parts))


def _tasks(arguments: Arguments) -> list[tuple[str, str]]:
    pairs = [text.partition("=") for text in arguments.task]
    return [(name.strip(), source) for name, _, source in pairs]


def _sources(tasks: Iterable[tuple[str, str]]) -> tuple[Model, ...]:
    return tuple(Model(name, *parse_source(source)) for name, source in tasks)


def _order(text: str | None) -> int | None:
    """The number of an order; 0 for the order given."""
    if text is None:
        return None
    if text == "given":
        return 0
    if not text.isdecimal() or len(text) > _MOST_DIGITS or int(text) < 1:
        raise ConfigError(problem("order", f"must be a number from 1 or 'given', got {shown(text)}"))
    return int(text)
