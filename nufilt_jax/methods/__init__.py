"""Every merging rule as a pair of pure functions, in one registry, which rules of your own can join."""

import dataclasses
import importlib
import importlib.metadata
import itertools
import os
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args

from jax.sharding import Mesh

from nufilt_jax.anatomy import shape_in
from nufilt_jax.config import ENTRY_POINTS, OtherParams, kind_problems, problem
from nufilt_jax.config import MethodConfig as MethodConfig
from nufilt_jax.config import number as number
from nufilt_jax.errors import CheckpointError, ConfigError, Problem, SolveError, raise_all
from nufilt_jax.methods import (
    adamerging,
    adapter_only,
    iso_c,
    knots,
    magmax,
    nufilt,
    null_space,
    opcm,
    sum,
    task_arithmetic,
    ties,
    tsv_m,
    weight_average,
    wemoe,
    wudi,
)
from nufilt_jax.methods.data import TaskData as TaskData
from nufilt_jax.methods.elementwise import move_others
from nufilt_jax.methods.matrices import require_finite
from nufilt_jax.methods.merger import Merger as Merger
from nufilt_jax.methods.returned import checked
from nufilt_jax.methods.selection import Selection, select
from nufilt_jax.methods.selection import every_tensor as every_tensor
from nufilt_jax.methods.selection import is_linear_layer as is_linear_layer
from nufilt_jax.methods.selection import published_layers as published_layers
from nufilt_jax.methods.stacked import Names, Params, Ranks, TaskVector, stack_names, task_vector, zeros
from nufilt_jax.methods.stacked import Stacked as Stacked
from nufilt_jax.methods.state import Advance as Advance
from nufilt_jax.methods.state import Context as Context
from nufilt_jax.methods.state import MergeState as MergeState
from nufilt_jax.methods.state import Numbers, OnStack, check_task, nonfinite
from nufilt_jax.methods.state import Rule as Rule
from nufilt_jax.values import array_problems, native

__all__ = [
    "ALIASES",
    "RULES",
    "Advance",
    "Context",
    "MergeState",
    "Merger",
    "MethodConfig",
    "Rule",
    "Stacked",
    "TaskData",
    "every_tensor",
    "find",
    "get",
    "is_linear_layer",
    "load_own",
    "number",
    "published_layers",
    "register",
]


def __dir__() -> list[str]:
    return list(__all__)


RULES: dict[str, Rule[Any]] = {
    module.RULE.name: module.RULE
    for module in (
        nufilt,
        null_space,
        adapter_only,
        sum,
        weight_average,
        task_arithmetic,
        ties,
        knots,
        magmax,
        iso_c,
        opcm,
        tsv_m,
        wudi,
        adamerging,
        wemoe,
    )
}
ALIASES = {"iso": "iso_c", "tsvm": "tsv_m"}  # the names in their authors' programs


def register(rule: Rule[Any]) -> Rule[Any]:
    """Makes a rule known by its name, as `get` and the command line take it; returns it.

    An installed package does the same without being imported, by an entry point of the group `nufilt_jax.methods`.

    Raises:
      ConfigError: another rule has that name, or a setting has a type that none can have.
    """
    raise_all(ConfigError, kind_problems(rule.config))
    if rule.name in ALIASES or RULES.setdefault(rule.name, rule) is not rule:
        raise ConfigError(problem("method", f"there is a method {rule.name!r} already", "choose another name"))
    return rule


def canonical_name(name: str) -> str:
    """A method's own name, of an alias.

    >>> canonical_name("tsvm")
    'tsv_m'
    """
    return ALIASES.get(name, name)


def find(name: str) -> Rule[Any]:
    """The rule called `name`: one of this package, registered, or of another package's entry point.

    Raises:
      ConfigError: there is none.
    """
    name = canonical_name(name)
    if name not in RULES:
        for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
            return register(_checked(point.load(), name))
        fix = f"choose from {', '.join(RULES)}"
        if ":" in name:  # nothing is imported because a file says so
            fix = f"it is a rule of your own: say --method {name}"
        raise ConfigError(problem("method", f"{name!r} is not known", fix))
    return RULES[name]


def load_own(name: str) -> Rule[Any]:
    """Imports and registers a rule of the user's own, which then has this name.

    Args:
      name: `MODULE:RULE`; the module may lie in the current folder.

    Raises:
      ConfigError: there is no such module or rule in it.
    """
    if name in RULES:
        return RULES[name]
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(problem("method", f"{name} cannot be imported: {error}", "give MODULE:RULE")) from error
    finally:
        sys.path.pop(0)
    return register(_checked(found, name))


def _checked(found: Any, name: str) -> Rule[Any]:
    if not isinstance(found, Rule):
        what = f"{name} is a {type(found).__name__}, and not a nufilt_jax.methods.Rule"
        raise ConfigError(problem("method", what, "see the documentation: write a method in 40 lines"))
    return dataclasses.replace(found, name=name)


def config_of(name: str, config: MethodConfig | None, settings: Mapping[str, Any]) -> MethodConfig:
    """A rule's settings, given whole or by name.

    Raises:
      ConfigError: both, or settings of another rule, or that are out of range, all listed.
    """
    kind = find(name).config
    fields = {field.name for field in dataclasses.fields(kind)}
    if config is not None:
        raise_all(ConfigError, (Problem(key, "does not go with config", "leave one of them out") for key in settings))
        # No subclass either: it belongs to another rule, and its further fields would be dropped unseen.
        if type(config) is not kind:
            raise ConfigError(Problem("config", f"{name} takes a {kind.__name__}, got a {type(config).__name__}"))
        return config
    known = f"its settings: {', '.join(sorted(fields))}" if fields else "it has none"
    unknown = [Problem(key, f"{name} has no such setting", known) for key in settings if key not in fields]
    raise_all(ConfigError, unknown)
    return kind(**settings)


def get(
    name: str,
    config: MethodConfig | None = None,
    *,
    seed: int = 0,
    layers: str | None = None,
    other_params: OtherParams = "pretrained",
    conv: bool = False,
    selection: Selection | None = None,
    mesh: Mesh | None = None,
    ranks: Ranks | None = None,
) -> Merger:
    """A merging rule, ready to use.

    Args:
      name: one of `RULES`.
      config: its settings; None for the defaults.
      seed: of the adapter's start.
      layers: regular expression searched in the names of matrices; None for the rule's own choice.
      other_params: what becomes of the parameters outside the selected layers: they stay `pretrained`, stay as the
        `first` task has them, or are the running `average` of the tasks'.
      conv: whether convolutions inside blocks are matrices too, `[out, in * kh * kw]`.
      selection: what `selection.select` chose with these arguments from the whole model; for a base that holds only
        the tensors touched, whose family its names do not tell.
      mesh: one-dimensional, of devices of this process that share the layers, if the rule spreads; None for one device.
      ranks: of layers whose D is kept in factors, the rank that each task may have; see `Rule.in_factors`.

    Raises:
      ConfigError: an unknown rule, or settings of another rule.

    >>> import numpy as np, nufilt_jax as nj
    >>> base = {"model.layers.0.self_attn.q_proj.weight": np.zeros((4, 4), np.float32)}
    >>> rule = nj.methods.get("sum")
    >>> state = rule.update(rule.init(base), {name: x + 1 for name, x in base.items()})
    >>> float(state.merged["model.layers.0.self_attn.q_proj.weight"].sum())
    16.0
    """
    rule = find(name)
    settings = config_of(name, config, {})
    if other_params not in get_args(OtherParams):
        what = f"must be one of {', '.join(get_args(OtherParams))}, got {other_params!r}"
        raise ConfigError(problem("other_params", what))

    def choose(base: Params) -> tuple[Names, Names]:
        """The stacks that the rule works on, and those that follow `other_params`."""
        how: dict[str, Any] = {"layers": layers, "other_params": other_params, "scope": rule.scope, "conv": conv}
        chosen = selection or select(base, **how)
        shapes = {name: shape_in(base, name) for name in chosen.layers + chosen.other}
        return stack_names(shapes, chosen.layers, ranks), stack_names(shapes, chosen.other, ranks)

    def init(base: Params) -> MergeState:
        if selection is None:  # else it comes from where the base was looked at
            raise_all(CheckpointError, array_problems(base, "base"))
        mine, others = choose(base)
        shapes = {members[0]: shape_in(base, members[0]) for members in mine + others}
        return MergeState({name: native(x) for name, x in base.items()}, zeros(shapes, mine + others, ranks))

    def update(
        state: MergeState,
        task: Params | TaskVector,
        on_stack: OnStack | None = None,
        *,
        donate: bool = False,
        data: TaskData | None = None,
        numbers: Numbers = MappingProxyType({}),
        adapter_start: Params | None = None,
    ) -> MergeState:
        if adapter_start is not None and not rule.trains_adapter:
            raise ConfigError(Problem("adapter_start", f"means nothing to {rule.name}, which trains no correction"))
        if rule.needs_data and data is None:
            raise ConfigError(Problem("data", f"{name} needs examples of each task", "give update its `data`"))
        mine, others = choose(state.base)
        params = None
        if not isinstance(task, TaskVector):
            params = task
            check_task(state.base, task, state.touched)
            task = task_vector(state.base, task, mine + others)
        # Rules overwrite D.
        delta = state.delta if donate else state.delta.copied()
        own = dataclasses.replace(state, delta=delta.only(mine))
        take = rule.first if state.step == 0 else rule.advance
        try:
            context = Context(settings, seed, on_stack, data, numbers, mesh, adapter_start)
            done = checked(rule.name, own.delta, take(own, task.only(mine), context))
            moved = move_others(delta.only(others), task.only(others), state.step, other_params)
            # For all rules alike; those that know a remedy have refused before.
            require_finite(done.delta + moved)
        except SolveError:
            # Only now: looking at every weight would take longer than many a solve.
            if params is not None:
                causes = [nonfinite(state.base, state.touched, "base"), nonfinite(params, state.touched, "task")]
                raise_all(SolveError, itertools.chain(*causes))
            raise
        extra, added, report = dict(done.extra), dict(done.added), dict(done.report)
        return MergeState(state.base, done.delta + moved, state.step + 1, extra, added, report)

    def look(state: MergeState, task: TaskVector, number: int, numbers: Numbers) -> Numbers:
        mine, _ = choose(state.base)
        own = dataclasses.replace(state, delta=state.delta.only(mine))
        part = rule.looks(state.step)[number].part
        return part(own, task.only(mine), Context(settings, seed, None, None, numbers, mesh))

    def prepare(state: MergeState, task: TaskVector) -> None:
        mine, _ = choose(state.base)
        rule.prepare(dataclasses.replace(state, delta=state.delta.only(mine)), task.only(mine), settings)

    return Merger(init, update, look, rule.name, settings, rule.remembers(settings), prepare)
