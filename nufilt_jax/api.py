"""A whole merge as one call, from Python."""

import dataclasses
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nufilt_jax.checkpoints.saving import Source
from nufilt_jax.errors import ConfigError, Problem, error_of, gathering, in_python, of_kind
from nufilt_jax.values import model_problems

if TYPE_CHECKING:  # JAX and the engine are loaded by the call
    import numpy as np

    from nufilt_jax.config import MethodConfig, OtherParams, OutputKind
    from nufilt_jax.engine.inspection import Inspection
    from nufilt_jax.engine.job import Job
    from nufilt_jax.engine.plan import Plan
    from nufilt_jax.output.recipe import Settings


def merge(
    base: "Source | Mapping[str, Any]",
    tasks: "Mapping[str, Source | Mapping[str, Any]] | Sequence[Source | Mapping[str, Any]]",
    out: Source | None = None,
    *,
    method: str = "nufilt",
    config: "MethodConfig | None" = None,
    seed: int = 0,
    layers: str | None = None,
    conv: bool = False,
    other_params: "OtherParams" = "pretrained",
    format: str | None = None,
    dtype: str | None = None,
    output: "OutputKind" = "model",
    adapter_out_rank: int | None = None,
    data: Source | None = None,
    devices: int | str | None = None,
    strict: bool = False,
    max_memory: int | str | None = None,
    offline: bool = False,
    **settings: Any,
) -> "dict[str, np.ndarray]":
    """Merges fine-tuned models into one, one after another, without data: what `nufilt merge` does.

    With `out`, and models given as folders or Hub ids, it is that command: the same plan, memory limit, output folder
    and resuming; evaluating is left to `nufilt evaluate`. Without it, or with models in memory, the tasks are merged in
    memory.

    Args:
      base: the pre-trained model: a folder or Hub id, `PATH_OR_HUB[@REV]`, or its weights by canonical name.
      tasks: fine-tuned models in the same forms, in order, with their names or without; adapters of a base in a folder
        or on the Hub too.
      out: output folder; None to get the weights only.
      method: name of the rule; `methods.get` and `--method help` have them.
      config: the rule's settings; None to take `settings`.
      seed: of the corrections' random start.
      layers: regular expression searched in the names of matrices; None for the rule's own choice.
      conv: whether convolutions inside blocks are matrices too.
      other_params: what becomes of all other parameters: `pretrained`, `first` or `average`.
      format: of the weight files, `safetensors` or `flax`; None for the base's.
      dtype: of the stored weights; None for the base's.
      output: what is written: the whole `model`, or, if all tasks are adapters, an `adapter` of the base.
      adapter_out_rank: most rank of that; None for the tasks' together.
      data: folder with examples of each task, for rules that learn from them.
      devices: so many devices share the layers, or `all`; None for one.
      strict: refuse a task of which a head or a table would stay the base's, in place of a warning.
      max_memory: bytes, or as `8GB`, that a merge into `out` may take; None for half of what is free.
      offline: use the local Hub cache alone.
      **settings: the rule's settings by name, as `filter_rank=64`.

    Returns:
      The merged model by canonical name; with `out`, as read from there, an adapter put on its base.

    Raises:
      NufiltError: with every problem of models and settings at once.

    Warns:
      UserWarning: what the command would warn about.

    >>> import numpy as np, nufilt_jax as nj
    >>> base = {"model.layers.0.mlp.up_proj.weight": np.zeros((4, 4), np.float32)}
    >>> merged = nj.merge(base, [{name: x + 1 for name, x in base.items()}] * 3, method="sum")
    >>> float(merged["model.layers.0.mlp.up_proj.weight"].sum())
    48.0
    """
    from nufilt_jax.engine.asked import asked_settings, idle_data, idle_settings, task_name_problems

    if isinstance(tasks, Iterable) and not isinstance(tasks, Mapping | str):
        tasks = list(tasks)
    if wrong := model_problems(base, tasks):
        raise ConfigError(*wrong)
    named = dict(tasks) if isinstance(tasks, Mapping) else dict(zip(task_names(tasks), tasks, strict=True))
    problems = task_name_problems(named)
    rule, chosen = _rule(method, config, settings, problems)
    how: dict[str, Any] = {"seed": seed, "layers": layers, "conv": conv, "other_params": other_params}
    writing = {"format": format, "dtype": dtype, "output": output, "adapter_out_rank": adapter_out_rank}
    asked = asked_settings(rule, chosen, problems, **how, **writing)
    into = {"data": data, "devices": devices, "max_memory": max_memory}
    given = settings if config is None else _other_than_default(chosen)
    idle = (*map(str, idle_settings(chosen, given)), *idle_data(data, rule))
    are_places = not any(isinstance(model, Mapping) for model in (base, *named.values()))
    told = {name for name, value in (writing | into).items() if not (value is None or (name, value) in _AS_IT_IS)}
    found = [] if named else [Problem("tasks", "is empty", "give at least one fine-tuned model")]
    if out is None:
        found += [Problem(name, "belongs to out", "give that too") for name in sorted(told)]
    elif not are_places:
        alone = told - {"format", "dtype"}
        found += [Problem(name, "needs folders or Hub ids", "give no weights") for name in sorted(alone)]
    problems += of_kind(ConfigError, found)
    if are_places and named:
        job = _job(base, named, asked, problems, idle, strict=strict, **(into if out is not None else {}))
        if out is None:
            return _read_and_merged(job, offline=offline)
        return _merged_into(Path(os.path.expanduser(out)), job, offline=offline)
    if problems:
        raise error_of(problems)
    return _merged_in_memory(base, named, out, asked, idle, strict=strict, offline=offline)


_AS_IT_IS = (("output", "model"),)  # which asks for nothing


def _rule(
    method: str, config: "MethodConfig | None", settings: Mapping[str, Any], problems: list[Problem]
) -> "tuple[str, MethodConfig]":
    """A rule's own name and settings; what is refused goes to `problems`, and its default takes its place."""
    from nufilt_jax.methods import RULES, config_of, find

    rule = RULES["nufilt"]
    with gathering(problems):
        rule = find(str(method))
        return rule.name, config_of(rule.name, config, settings)
    return rule.name, rule.config()


def _other_than_default(config: "MethodConfig") -> list[str]:
    """The fields that a caller who gave these settings whole must have set."""
    return [field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default]


def task_names(sources: Iterable[Any]) -> list[str]:
    """A name for each model: the end of its path or Hub id, numbered where two are alike; of weights, `task-1`.

    >>> task_names(["me/cars", "you/cars@v2", {}])
    ['cars', 'cars-2', 'task-3']
    """
    names: list[str] = []
    for number, source in enumerate(sources, 1):
        text = "" if isinstance(source, Mapping) else os.fspath(source).rstrip("/").rpartition("/")[2]
        stem = text.partition("@")[0] or f"task-{number}"
        numbered = (f"{stem}-{n}" for n in range(2, len(names) + 3))
        names.append(stem if stem not in names else next(name for name in numbered if name not in names))
    return names


def _job(
    base: Any,
    tasks: Mapping[str, Any],
    settings: "Settings",
    problems: list[Problem],
    idle: tuple[str, ...],
    *,
    strict: bool,
    data: Source | None = None,
    devices: int | str | None = None,
    max_memory: int | str | None = None,
) -> "Job":
    from nufilt_jax.checkpoints import parse_source
    from nufilt_jax.engine.asked import asked_memory
    from nufilt_jax.engine.devices import count_devices
    from nufilt_jax.engine.job import Job
    from nufilt_jax.output.recipe import Model

    most, n_devices = asked_memory(max_memory, problems), 1
    with gathering(problems):
        n_devices = count_devices(None if devices is None else str(devices))
    return Job(
        base=Model("base", *parse_source(os.fspath(base))),
        # The command's names have no space at their ends either.
        sources=tuple(Model(str(name).strip(), *parse_source(os.fspath(task))) for name, task in tasks.items()),
        settings=settings,
        out=None,
        data=None if data is None else Path(os.path.expanduser(data)),
        max_memory=most,
        devices=n_devices,
        strict=strict,
        warnings=idle,
        problems=tuple(problems),
    )


def _merged_into(out: Path, job: "Job", *, offline: bool) -> "dict[str, np.ndarray]":
    from nufilt_jax.checkpoints import load, open_task
    from nufilt_jax.engine.inspection import inspect
    from nufilt_jax.engine.plan import make_plan
    from nufilt_jax.engine.records import layers_as_begun
    from nufilt_jax.engine.run import run
    from nufilt_jax.engine.timing import Clock
    from nufilt_jax.linalg.dispatch import at_once
    from nufilt_jax.output.place import OutputPlace

    place = OutputPlace(out)
    with place.locked(), at_once(layers_as_begun(place)):
        plan = make_plan(dataclasses.replace(job, out=place.out), offline=offline)
        inspection = inspect(plan)
        _warn(plan, inspection)
        run(plan, inspection, place, _Nobody(), Clock())
    for text in place.warnings:
        _warn_caller(text)
    is_adapter = plan.settings.output == "adapter"
    return open_task(str(place.out), plan.base).read() if is_adapter else load(str(place.out), offline=True)


def _warn(plan: "Plan", inspection: "Inspection") -> None:
    """Of what the command warns about, of the user's own call."""
    from nufilt_jax.engine.coverage import outside_warnings

    outside = outside_warnings(plan.base, plan.selection, plan.settings, inspection.changes)
    for text in (*plan.warnings, *inspection.warnings, *outside):
        _warn_caller(in_python(text))


def _warn_caller(text: str) -> None:
    """A warning at the line of the user's own code, by however many of the package's frames it was called."""
    package, frame, level = Path(__file__).parent, sys._getframe(), 1
    while frame is not None and package in Path(frame.f_code.co_filename).parents:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)


def _read_and_merged(job: "Job", *, offline: bool) -> "dict[str, np.ndarray]":
    """Models of the disk or the Hub, adapters too, merged in memory."""
    from nufilt_jax.engine.inspection import inspect
    from nufilt_jax.engine.loaded import merged_one_by_one, rounded
    from nufilt_jax.engine.plan import make_plan

    plan = make_plan(job, offline=offline)
    inspection = inspect(plan)
    _warn(plan, inspection)
    touched = plan.selection.touched
    tasks = {name: task.unread(touched) for name, task in plan.tasks.items()}
    with inspection.files.required(plan.base, *plan.tasks.values()):
        return rounded(merged_one_by_one(plan.base.read(), tasks, plan.settings, plan.selection), plan.base.source)


def _merged_in_memory(
    base: Any,
    tasks: Mapping[str, Any],
    out: Source | None,
    settings: "Settings",
    idle: tuple[str, ...],
    *,
    strict: bool,
    offline: bool,
) -> "dict[str, np.ndarray]":
    from nufilt_jax.checkpoints import load, save
    from nufilt_jax.engine.loaded import merged_in_memory, rounded, unrounded

    like = "" if isinstance(base, Mapping) else os.fspath(base)
    if out is not None and not like:
        what = "needs a base that is a folder or Hub id, whose files are written anew"
        raise ConfigError(Problem("out", what, "leave it out, and give what is returned to nufilt_jax.save"))

    def warn(text: str) -> None:
        _warn_caller(in_python(text))

    place = None if out is None else Path(os.path.expanduser(out))
    state = merged_in_memory(base, tasks, settings, strict=strict, offline=offline, warn=warn, warnings=idle, out=place)
    if place is None:
        return rounded(state, like or "base")
    save(unrounded(state), place, like=like, format=settings.format, dtype=settings.dtype, offline=offline)
    return load(place, offline=True)


class _Nobody:
    """A watcher that says nothing."""

    def cell(self, task: str, window: str, done: int, total: int) -> None:
        """A cell begins."""

    def stack(self, description: str, report: Any) -> None:
        """A group of layers is solved."""

    def compiling(self, program: str) -> None:
        """A program is about to be compiled."""

    def merged(self) -> None:
        """All cells are done."""

    def phase(self, description: str) -> None:
        """Something else begins."""
