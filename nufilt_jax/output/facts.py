"""What a recipe tells of a merge beside what went in: small parts, each a type; nobody else knows their keys."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """A part of a recipe: its fields are the keys, and a field that is None stands for a key that is not there."""

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """What is known here of an entry; another version's keys are not kept."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in entry.items() if key in known})

    def to_json(self) -> dict[str, Any]:
        """The entry."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Covered(Fact):
    """Tensors whose names have one pattern, all of them merged by the method, or all left.

    Attributes:
      pattern: `*` for numbers, `{q,k}_proj` for modules.
      kinds: how many modules it names.
      layers: how many tensors.
      parameters: how many numbers these have.
      share: of tensors that are left, by task the part of its squared change that lies in them.
    """

    pattern: str
    kinds: int
    layers: int
    parameters: int | None = None
    share: Mapping[str, float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowDone(Fact):
    """A window of the grid.

    Attributes:
      layers: how many.
      bytes: of its D.
      tasks: how many are merged into it.
    """

    layers: int
    bytes: int | None = None
    tasks: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host(Fact):
    """What the bits of a merge depend on, beside the versions and the kind of device, and what others may differ by.

    Attributes:
      machine: the kind of processor.
      processor: its name.
      layers_at_once: how many layers were solved at a time.
      tolerance: by how much the same merge may differ elsewhere, see `engine.sameness`.
      is_mixed: whether something was merged on another one, by other versions or on another device.
    """

    machine: str | None = None
    processor: str | None = None
    layers_at_once: int | None = None
    tolerance: Mapping[str, float] | None = None
    is_mixed: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled(Fact):
    """The programs that were compiled.

    Attributes:
      programs: how many.
      from_cache: how many of them were found in the compile cache.
      seconds: that it took.
    """

    programs: int
    from_cache: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryUse(Fact):
    """Resident memory in bytes.

    Attributes:
      allowed: the cap.
      by: what set it.
      planned: the most at any time.
      peak: the most that was measured; None where no system tells.
    """

    allowed: int
    by: str
    planned: int
    peak: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergedAdapter(Fact):
    """The adapter that is the output.

    Attributes:
      modules: what the model's class calls the module of a layer, by canonical name; as the adapters call it.
      config: settings taken over from the first adapter.
      rank: its largest; None before it is written.
      energy_lost: the share of D's energy that a lower rank than that of the factors loses.
      layers: rank and energy lost by module.
    """

    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rank: int | None = None
    energy_lost: float | None = None
    layers: Mapping[str, Mapping[str, Any]] | None = None
