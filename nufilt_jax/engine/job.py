"""What a command asks for, before any checkpoint is opened."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nufilt_jax.config import ComputeType, MethodConfig, OtherParams
from nufilt_jax.errors import Problem


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
    """

    method: str
    config: MethodConfig
    seed: int = 0
    layers: str | None = None
    other_params: OtherParams = "pretrained"
    format: str | None = None
    dtype: str | None = None
    conv: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For the recipe."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model as the user names it, or as a recipe does.

    Attributes:
      name: the task's name; `base` for the base.
      source: folder or Hub id.
      revision: of a Hub id.
      sha256: of its weight files by name, as a recipe recorded them; None if it comes from the command line.
    """

    name: str
    source: str
    revision: str | None = None
    sha256: Mapping[str, str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How models are evaluated.

    Attributes:
      tasks_file: describes tasks beside those that are known.
      heads_from: the CLIP model whose text tower makes the zero-shot heads; None for that of the model itself.
      limit: at most so many examples of each task; None for all.
      dtype: in which the forward passes compute.
      offline: use the local caches of the Hub alone.
    """

    tasks_file: Path | None = None
    heads_from: str | None = None
    limit: int | None = None
    dtype: ComputeType = "float32"
    offline: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
    """A merge under way or finished, as its recipe tells.

    Attributes:
      folder: where the recipe stands: the output folder, or the partial one beside it.
      base: with its hashes.
      tasks: in order, with their hashes, those not merged yet included.
      settings: how.
      steps: the recipe's entries of the steps done.
    """

    folder: Path
    base: Source
    tasks: tuple[Source, ...]
    settings: Settings
    steps: tuple[dict[str, Any], ...]

    @property
    def done(self) -> int:
        """Number of tasks merged."""
        return len(self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A command, understood.

    Attributes:
      base: the backbone.
      sources: all tasks in order, those that `continues` has merged included.
      settings: how; a refused value is replaced by its default, so that the search for problems can go on.
      out: the output folder; None if only a plan is wanted.
      data: folder with examples of each task; None if there is none.
      evaluation: how the merged model is evaluated after every step; None if it is not.
      strict: refuse tasks of which a head or a table would stay the base's.
      continues: the merge that --add continues: of the tasks that it has merged, no file is needed.
      warnings: what the user should know and may accept.
      problems: what is wrong so far.
    """

    base: Source
    sources: tuple[Source, ...]
    settings: Settings
    out: Path | None
    data: Path | None = None
    evaluation: EvaluationOptions | None = None
    strict: bool = False
    continues: Recorded | None = None
    warnings: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def n_merged(self) -> int:
        """Number of leading tasks whose files are not needed."""
        return self.continues.done if self.continues else 0
