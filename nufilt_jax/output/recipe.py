"""The recipe of a merge, `nufilt.json`: what went in, how, and what each step did. Nobody else knows its keys."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from nufilt_jax.config import MethodConfig, OtherParams, OutputKind
from nufilt_jax.errors import ConfigError, OutputError, Problem
from nufilt_jax.output.facts import Compiled, Covered, Fact, Host, MemoryUse, MergedAdapter, WindowDone
from nufilt_jax.output.kinds import RECIPE_KINDS, RECIPE_MAY_HAVE, STEP, STEP_MAY_HAVE, require
from nufilt_jax.output.model import Model as Model
from nufilt_jax.output.model import found_from, seen_from

VERSION = 2  # of the recipe and of the state beside it; the recipes of nufilt_jax 0.1 name none
_NEWER = ("conv", "output", "adapter_out_rank")  # settings that earlier versions' recipes lack
OF_WRITING = ("format", "dtype", "adapter_out_rank")  # settings that no number depends on before the model is written

ConfigOf = Callable[[str], type[MethodConfig]]  # from a method's name to the class of its settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to merge; frozen in the recipe.

    Attributes:
      method: name of the rule.
      config: its settings.
      seed: of the adapter's start.
      layers: regular expression of the selected layers; None for the published choice.
      other_params: what becomes of all other parameters.
      format: of the weight files; None for the base's.
      dtype: of the stored weights; None for the base's.
      conv: whether convolutions of blocks are matrices too.
      output: the whole `model`, or an `adapter` of the base.
      adapter_out_rank: most rank of the adapter; None for that of the merge.
    """

    method: str
    config: MethodConfig
    seed: int = 0
    layers: str | None = None
    other_params: OtherParams = "pretrained"
    format: str | None = None
    dtype: str | None = None
    conv: bool = False
    output: OutputKind = "model"
    adapter_out_rank: int | None = None

    @classmethod
    def from_json(cls, document: Mapping[str, Any], config_of: ConfigOf) -> Self:
        """The settings in a recipe.

        Raises:
          ConfigError: a value that no settings may have.
        """
        names = (field.name for field in dataclasses.fields(cls))
        values = {name: document[name] for name in names if name in document or name not in _NEWER}
        return cls(config=config_of(values["method"])(**values.pop("config")), **values)

    def to_json(self) -> dict[str, Any]:
        """As they stand at a recipe's top."""
        return dataclasses.asdict(self)

    def differences(self, other: "Settings", *, is_written: bool = True) -> list[tuple[str, Any, Any]]:
        """The settings in which another merge differs: name, value here, value there.

        Args:
          other: the other's settings.
          is_written: whether the model is there; if not, it may still be written in another format or type.
        """
        here, there = self.to_json(), other.to_json()
        configs = here.pop("config"), there.pop("config")
        pairs = [(key, here[key], there[key]) for key in there if is_written or key not in OF_WRITING]
        if self.method == other.method:
            pairs += [(key, configs[0].get(key), value) for key, value in configs[1].items()]
        return [(key, mine, theirs) for key, mine, theirs in pairs if mine != theirs]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What merging one task did; of a whole model, or of some of its layers.

    Attributes:
      task: its name.
      seconds: that it took.
      losses: sums over layers, before each Adam step and after the last; None for what is not finite.
      resumed: whether an earlier run had done it.
      outside: the share of the task's squared change that lies in tensors that the merge leaves.
      timings: seconds by what they were spent on; `compile` is a part of `solve`.
      examples: the file with the examples that the method learned from, and its hash.
      accuracy: of the merged model on every task, by name; None if it was not evaluated.
      accuracy_limit: at most so many examples of each task were looked at.
    """

    task: str
    seconds: float = 0.0
    losses: tuple[float | None, ...] = ()
    resumed: bool = False
    outside: float | None = None
    timings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    examples: Mapping[str, str] | None = None
    accuracy: Mapping[str, float] | None = None
    accuracy_limit: int | None = None

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """A step from its entry; what is not known here is not kept."""
        require(entry, STEP, STEP_MAY_HAVE)
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in entry.items() if key in known}
        return cls(**{**values, "losses": tuple(values["losses"]), "seconds": float(values["seconds"])})

    def to_json(self) -> dict[str, Any]:
        """Its entry; what was not asked for is left out."""
        entry: dict[str, Any] = {"task": self.task, "seconds": round(self.seconds, 3)}
        entry |= {"losses": list(self.losses), "resumed": self.resumed}
        entry |= {} if self.outside is None else {"outside": round(self.outside, 6)}
        entry |= {"timings": {what: round(seconds, 3) for what, seconds in self.timings.items()}}
        entry |= {} if self.examples is None else {"examples": dict(self.examples)}
        if self.accuracy is not None:
            entry |= {"accuracy": dict(self.accuracy), "accuracy_limit": self.accuracy_limit}
        return entry

    def moved(self, place: Callable[[str], str]) -> Self:
        """The same step, the file of its examples spelt otherwise."""
        if self.examples is None or "file" not in self.examples:
            return self
        return dataclasses.replace(self, examples={**self.examples, "file": place(self.examples["file"])})

    def as_resumed(self) -> "Step":
        """The same, done by an earlier run."""
        return dataclasses.replace(self, resumed=True)

    def told(self, other: "Step | None") -> "Step":
        """With what another part of the step says of the model as a whole."""
        known = {name: x for name in _OF_MODEL if other is not None and (x := getattr(other, name)) is not None}
        return dataclasses.replace(self, **known)

    @classmethod
    def joined(cls, parts: Sequence["Step"]) -> Self:
        """One step of a whole model, from those of its windows."""
        timings: dict[str, float] = {}
        for part in parts:
            for what, seconds in part.timings.items():
                timings[what] = timings.get(what, 0.0) + seconds
        with_losses = [part.losses for part in parts if part.losses]
        return cls(
            task=parts[0].task,
            seconds=sum(part.seconds for part in parts),
            losses=tuple(map(_sum, zip(*with_losses, strict=True))),
            resumed=all(part.resumed for part in parts),
            timings=timings,
            **{name: next((x for part in parts if (x := getattr(part, name)) is not None), None) for name in _OF_MODEL},
        )


_OF_MODEL = ("outside", "examples", "accuracy", "accuracy_limit")  # of a step as a whole: any of its parts may tell


def _sum(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All of `nufilt.json`.

    Attributes:
      base: with its hashes.
      tasks: in order, with their hashes, those not merged yet included.
      settings: how.
      selected: what the method merges, by pattern.
      left: what it leaves although tasks moved it.
      steps: those that are done.
      windows: of the grid.
      versions: of this program and its libraries.
      device: where it ran.
      host: what the bits of the numbers depend on beside versions and device.
      files: SHA-256 of the output's own files, by path relative to the folder.
      timings: seconds by what they were spent on, besides the steps; `compile` is a part of `write_model`.
      compiled: the programs.
      memory: allowed, planned and measured.
      adapter: if that is the output.
      version: of the recipe.
    """

    base: Model
    tasks: tuple[Model, ...]
    settings: Settings
    selected: tuple[Covered, ...] = ()
    left: tuple[Covered, ...] = ()
    steps: tuple[Step, ...] = ()
    windows: tuple[WindowDone, ...] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    device: str = ""
    host: Host = Host()  # noqa: RUF009  frozen
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    timings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    compiled: Compiled | None = None
    memory: MemoryUse | None = None
    adapter: MergedAdapter | None = None
    version: int = VERSION

    @classmethod
    def from_json(
        cls, document: Mapping[str, Any], folder: Path, config_of: ConfigOf, *, is_finished: bool = False
    ) -> Self:
        """Checks that a recipe holds what going on needs.

        Args:
          document: content of `nufilt.json`.
          folder: where it stands.
          config_of: gives the class of a method's settings.
          is_finished: whether every task needs its step.

        Raises:
          OutputError: it is damaged, or from a version with other settings.
        """
        try:
            require(document, RECIPE_KINDS, RECIPE_MAY_HAVE)
            recipe = cls(
                base=Model.from_json(document["base"], "base"),
                tasks=tuple(map(Model.from_json, document["tasks"])),
                settings=Settings.from_json(document, config_of),
                steps=tuple(map(Step.from_json, document["steps"])),
                version=document.get("recipe_version", 1),
                **_told(document),
            )
            merged = recipe.task_names if is_finished else recipe.task_names[: len(recipe.steps)]
            if [step.task for step in recipe.steps] != merged:
                raise ValueError("its steps are not those of its tasks")
            if recipe.version not in (1, VERSION):
                raise ValueError(f"it is of version {recipe.version!r}, and this program knows up to {VERSION}")
            recipe = recipe._moved(lambda source: found_from(source, folder))
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            if isinstance(error, ConfigError):
                reason = "; ".join(map(str, error.problems))
            what = f"the recipe nufilt.json is damaged or of another version: {reason}"
            raise OutputError(Problem(str(folder), what, "merge again into another folder")) from error
        return recipe

    def to_json(self) -> dict[str, Any]:
        """The content of `nufilt.json`."""
        document = {
            "recipe_version": self.version,
            "base": self.base.to_json(),
            "tasks": [{"name": task.name, **task.to_json()} for task in self.tasks],
            **self.settings.to_json(),
            "steps": [step.to_json() for step in self.steps],
        }
        document |= {name: [fact.to_json() for fact in getattr(self, name)] for name in _LISTS}
        told = {name: getattr(self, name) for name in (*_AS_THEY_ARE, *_FACTS)}
        entries = {name: value.to_json() if isinstance(value, Fact) else value for name, value in told.items()}
        return document | {name: entry for name, entry in entries.items() if entry}

    def as_seen_from(self, folder: Path) -> Self:
        """The same recipe as it is written into `folder`: its paths begin there, and tell of nobody's home."""
        return self._moved(lambda source: seen_from(source, folder))

    def _moved(self, place: Callable[[str], str]) -> Self:
        tasks, steps = (tuple(part.moved(place) for part in parts) for parts in (self.tasks, self.steps))
        return dataclasses.replace(self, base=self.base.moved(place), tasks=tasks, steps=steps)

    def as_resumed(self) -> Self:
        """The same, all its steps done by an earlier run."""
        return dataclasses.replace(self, steps=tuple(step.as_resumed() for step in self.steps))

    @property
    def n_layers(self) -> int:
        """Number of layers that the merge touches."""
        return sum(window.layers for window in self.windows)

    @property
    def task_names(self) -> list[str]:
        """Of all tasks, in order."""
        return [task.name for task in self.tasks]

    def differences(self, settings: Settings, names: list[str], *, is_written: bool) -> list[tuple[str, Any, Any]]:
        """The settings and task names in which a command differs: name, value here, the command's."""
        found = self.settings.differences(settings, is_written=is_written)
        here, there = ", ".join(self.task_names), ", ".join(names)
        return found if here == there else [*found, ("task", here, there)]


_LISTS: dict[str, type[Any]] = {"selected": Covered, "left": Covered, "windows": WindowDone}
_AS_THEY_ARE = ("versions", "device", "files", "timings")
_FACTS: dict[str, type[Any]] = {"host": Host, "compiled": Compiled, "memory": MemoryUse, "adapter": MergedAdapter}


def _told(document: Mapping[str, Any]) -> dict[str, Any]:
    lists = {name: tuple(map(fact.from_json, document.get(name, ()))) for name, fact in _LISTS.items()}
    facts = {name: fact.from_json(document[name]) for name, fact in _FACTS.items() if name in document}
    return lists | facts | {name: document[name] for name in _AS_THEY_ARE if name in document}
