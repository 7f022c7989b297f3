"""A whole merge as one call, from Python."""

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nufilt_jax.errors import ConfigError, Problem, gathering, in_python, raise_all

if TYPE_CHECKING:  # JAX and the engine are loaded by the call
    import numpy as np

    from nufilt_jax.config import MethodConfig, OtherParams, OutputKind
    from nufilt_jax.engine.inspection import Inspection
    from nufilt_jax.engine.job import Job
    from nufilt_jax.engine.plan import Plan

Source = str | os.PathLike[str]


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
      tasks: fine-tuned models in the same forms, in order, with their names or without.
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
    from nufilt_jax.methods import config_of

    chosen = config_of(method, config, settings)
    named = dict(tasks) if isinstance(tasks, Mapping) else dict(zip(task_names(tasks), tasks, strict=True))
    if not named:
        raise ConfigError(Problem("tasks", "is empty", "give at least one fine-tuned model"))
    how: dict[str, Any] = {"method": method, "config": chosen, "seed": seed, "layers": layers, "conv": conv}
    how["other_params"] = other_params
    writing = {"format": format, "dtype": dtype, "output": output, "adapter_out_rank": adapter_out_rank}
    into = {"data": data, "devices": devices, "max_memory": max_memory}
    are_places = not any(isinstance(model, Mapping) for model in (base, *named.values()))
    if are_places and out is not None:
        out = Path(os.path.expanduser(out))
        return _merged_into(out, _job(base, named, how | writing, strict=strict, **into), offline=offline)
    told = {name for name, value in (writing | into).items() if value not in (None, "model")}
    raise_all(ConfigError, (Problem(name, "belongs to out", "give that too") for name in sorted(told) if out is None))
    alone = told - {"format", "dtype"}
    raise_all(ConfigError, (Problem(name, "needs folders or Hub ids", "give no weights") for name in sorted(alone)))
    if are_places:
        return _read_and_merged(_job(base, named, how, strict=strict), how, offline=offline)
    return _merged_in_memory(base, named, out, how, format=format, dtype=dtype, offline=offline)


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
    settings: dict[str, Any],
    *,
    strict: bool,
    data: Source | None = None,
    devices: int | str | None = None,
    max_memory: int | str | None = None,
) -> "Job":
    from nufilt_jax.checkpoints import parse_source
    from nufilt_jax.engine.devices import count_devices
    from nufilt_jax.engine.job import Job
    from nufilt_jax.engine.memory import parse_size
    from nufilt_jax.output.recipe import Model, Settings

    problems, most, n_devices = list[Problem](), None, 1
    with gathering(problems):
        most = parse_size(max_memory) if isinstance(max_memory, str) else max_memory
    with gathering(problems):
        n_devices = count_devices(None if devices is None else str(devices))
    return Job(
        base=Model("base", *parse_source(os.fspath(base))),
        sources=tuple(Model(name, *parse_source(os.fspath(source))) for name, source in tasks.items()),
        settings=Settings(**settings),
        out=None,
        data=None if data is None else Path(os.path.expanduser(data)),
        max_memory=most,
        devices=n_devices,
        strict=strict,
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


def _read_and_merged(job: "Job", how: dict[str, Any], *, offline: bool) -> "dict[str, np.ndarray]":
    """Models of the disk or the Hub, adapters too, merged in memory."""
    from nufilt_jax.engine.inspection import inspect
    from nufilt_jax.engine.plan import make_plan

    plan = make_plan(job, offline=offline)
    _warn(plan, inspect(plan))
    touched = plan.selection.touched
    tasks = {name: task.unread(touched) for name, task in plan.tasks.items()}
    return _merged_one_by_one(plan.base.read(), tasks, how, are_inspected=True)


def _merged_in_memory(
    base: Any,
    tasks: Mapping[str, Any],
    out: Source | None,
    how: dict[str, Any],
    *,
    format: str | None,
    dtype: str | None,
    offline: bool,
) -> "dict[str, np.ndarray]":
    from nufilt_jax.checkpoints import load, save

    like = "" if isinstance(base, Mapping) else os.fspath(base)
    if out is not None and not like:
        what = "needs a base that is a folder or Hub id, whose files are written anew"
        raise ConfigError(Problem("out", what, "leave it out, and give what is returned to nufilt_jax.save"))
    weights = base if isinstance(base, Mapping) else load(like, offline=offline)
    params = {
        name: task if isinstance(task, Mapping) else load(os.fspath(task), offline=offline)
        for name, task in tasks.items()
    }
    merged = _merged_one_by_one(weights, params, how, are_inspected=False)
    if out is not None:
        save(merged, os.fspath(out), like=like, format=format, dtype=dtype, offline=offline)
    return merged


def _merged_one_by_one(
    base: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]], how: dict[str, Any], *, are_inspected: bool
) -> "dict[str, np.ndarray]":
    import numpy as np

    from nufilt_jax import methods

    rule = methods.get(**{"name" if key == "method" else key: value for key, value in how.items()})
    state = rule.init(base)
    if not are_inspected:
        _inspect(base, tasks, state.touched)
    for name, task in tasks.items():
        with _naming(name):
            state = rule.update(state, task, donate=True)
    return {name: np.asarray(value) for name, value in state.merged.items()}


def _inspect(base: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]], touched: Sequence[str]) -> None:
    """Refuses weights in memory that cannot be merged, all at once, and warns of numbers that are merely kept."""
    from nufilt_jax.errors import CheckpointError
    from nufilt_jax.methods.state import check_task, nonfinite

    problems = nonfinite(base, touched, "base")
    for name, task in tasks.items():
        with gathering(problems), _naming(name):
            check_task(base, task, touched)
            raise_all(CheckpointError, nonfinite(task, touched, "task"))
    raise_all(CheckpointError, problems)
    for where, params in (("base", base), *((f"task {name!r}", task) for name, task in tasks.items())):
        for kept in nonfinite(params, params.keys() - set(touched), where, are_touched=False):
            _warn_caller(str(kept))


@contextlib.contextmanager
def _naming(task: str) -> Iterator[None]:
    """Says which task it is that a rule refuses."""
    from nufilt_jax.errors import NufiltError

    try:
        yield
    except NufiltError as error:
        found = (p._replace(where=f"task {task!r}") if p.where == "task" else p for p in error.problems)
        raise type(error)(*found) from error


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
