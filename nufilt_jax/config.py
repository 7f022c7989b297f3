"""The settings of every method: one frozen dataclass each, each default in one place, citing its table."""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, get_args

from nufilt_jax.errors import ConfigError, Problem, raise_all

Decomposition = Literal["auto", "eigh", "svd", "subspace"]
FirstTask = Literal["paper", "authors"]
Solver = Literal["adam", "closed_form"]
ComputeType = Literal["float32", "bfloat16"]  # of a forward pass
OtherParams = Literal["pretrained", "first", "average"]
Variant = Literal["code", "text"]
Entropy = Literal["of_each", "of_mean"]
RightFactor = Literal["P + BA", "I + BA", "BA"]


def number(
    default: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A numeric field with its range; whole numbers are at least 0 without saying so."""
    limits = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    return dataclasses.field(default=default, metadata={k: v for k, v in limits.items() if v is not None})


_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "above": operator.gt,
    "at least": operator.ge,
    "below": operator.lt,
    "at most": operator.le,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What all method settings share: they are hashable, and refuse what makes no sense.

    Raises:
      ConfigError: listing every field that is out of range, named as on the command line.
    """

    def __post_init__(self) -> None:
        raise_all(ConfigError, self.problems())

    def problems(self) -> list[Problem]:
        """Every field out of range."""
        fields = dataclasses.fields(self)
        found = ((field.name, _fault(field, getattr(self, field.name))) for field in fields)
        return [problem(name, f"must be {fault}") for name, fault in found if fault]

    @property
    def idle(self) -> dict[str, str]:
        """The fields that have no effect beside the others, and why."""
        return {}


def _fault(field: dataclasses.Field, value: object) -> str:
    """What a field's value must be and is not, with the value; empty if all is well."""
    if choices := get_args(field.type):
        return "" if value in choices else f"one of {', '.join(choices)}, got {value!r}"
    if field.type is bool:
        return "" if isinstance(value, bool) else f"true or false, got {value!r}"
    if field.type is int and (isinstance(value, bool) or not isinstance(value, int)):
        return f"a whole number, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return f"a finite number, got {value!r}"
    limits = {"at least": 0} if field.type is int else {}
    broken = [f"{word} {limit}" for word, limit in (limits | field.metadata).items() if not _HOLDS[word](value, limit)]
    return f"{broken[0]}, got {value}" if broken else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledConfig(MethodConfig):
    """What the methods share that scale what they merge.

    Attributes:
      scale: λ.
    """

    scale: float


def option(field_name: str) -> str:
    """The command-line spelling of a field: `filter_rank` -> `--filter-rank`."""
    return "--" + field_name.replace("_", "-")


def problem(field_name: str, what: str, fix: str = "") -> Problem:
    """A problem with the setting `field_name`."""
    return Problem(option(field_name), what, fix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectionsConfig(MethodConfig):
    """What the methods share that look at the leading directions of what is merged (Table 9, arXiv:2509.21413v2).

    Attributes:
      filter_rank: r_p, directions of the earlier tasks that the new one may not, or should not, touch. 0 is none.
      decomposition: route to the leading directions; all are exact or certified, see `linalg.subspace`.
    """

    filter_rank: int = 128
    decomposition: Decomposition = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NullSpaceConfig(DirectionsConfig):
    """The null-space filter alone: row 2 of Table 4, arXiv:2509.21413v2.

    Attributes:
      first_task: `paper` takes the first model as it is (Algorithm 1); `authors` also filters it, with the
        right singular vectors of a zero matrix, which deletes its first r_p input coordinates.
    """

    first_task: FirstTask = "paper"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolveConfig(DirectionsConfig):
    """An adapter and its training: one set for every model and task count (Table 9, arXiv:2509.21413v2).

    Attributes:
      adapter_rank: r_l, rank of the correction B A. 0 trains none.
      task_rank: r_v, directions of the new task on which it should keep its answer. 0 drops that wish.
      steps: Adam steps on the data-free loss.
      learning_rate: Adam's; constant.
    """

    adapter_rank: int = 64
    task_rank: int = 8
    steps: int = 50
    learning_rate: float = number(1e-3, above=0)

    @property
    def right_factor(self) -> RightFactor:
        """What τ is multiplied with to give the update."""
        return "P + BA"

    @property
    def closed_form_ridge(self) -> float | None:
        """λ of the closed form; None where B A is trained instead."""
        return None

    @property
    def trained_rank(self) -> int:
        """Rank of the B A that is trained; 0 if there is none."""
        return self.adapter_rank if self.closed_form_ridge is None else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class NufiltConfig(SolveConfig, NullSpaceConfig):
    """NUFILT: filter, adapt, fuse; the settings of `NullSpaceConfig`, of `SolveConfig`, and these.

    Attributes:
      solver: `adam` trains B A. `closed_form` writes down what answers the same loss best in place of τ B A, with no
        limit of rank (`core.closed_form`); adapter_rank, steps and learning_rate then have no effect.
      ridge: λ of the closed form, the price of a large correction, beside eigenvalues in [0, 1]; below 1e-4, rounding
        would decide. No effect on `adam`.
    """

    solver: Solver = "adam"
    ridge: float = number(1.0, at_least=1e-4)

    @property
    def idle(self) -> dict[str, str]:
        """The fields of the solver that was not chosen."""
        others = ("ridge",) if self.solver == "adam" else ("adapter_rank", "steps", "learning_rate")
        return dict.fromkeys(others, f"the solver is {self.solver}")

    @property
    def closed_form_ridge(self) -> float | None:
        """λ, if that is the solver."""
        return self.ridge if self.solver == "closed_form" else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOnlyConfig(SolveConfig):
    """NUFILT's objective without its filter: row 3 of Table 4, arXiv:2509.21413v2.

    Attributes:
      variant: `code` adds τ (I + BA), what the authors' program does without the filter; `text` adds τ B A.
    """

    variant: Variant = "code"

    @property
    def right_factor(self) -> RightFactor:
        """What τ is multiplied with to give the update."""
        return "I + BA" if self.variant == "code" else "BA"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SumConfig(MethodConfig):
    """The plain sum of task vectors has no settings: row 1 of Table 4."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightAverageConfig(MethodConfig):
    """The running mean of the models has no settings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskArithmeticConfig(ScaledConfig):
    """Task arithmetic.

    Attributes:
      scale: factor on each task vector; 0.3 for 8 tasks, 0.1 for 14 and 20, 0.3 for Flan-T5 (Table 9).
      accumulate: adds to what is merged. False starts from the backbone at every step, as the authors' program for
        Flan-T5 does (Table 2): nothing but the last task remains.
    """

    scale: float = 0.3
    accumulate: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiesConfig(ScaledConfig):
    """TIES-Merging, continual.

    Attributes:
      scale: factor on what is added; 0.3 for 8 tasks, 0.1 for 14 and 20, 0.3 for Flan-T5 (Table 9).
      density: share of the entries that trimming keeps (Table 9); above 1 it is read as a percentage.
      variant: `code` trims and elects between D and τ, as the authors' program does; `text` between the previous
        TIES output and τ (Appendix B.3), which is one more vector to remember.
      merge_first: merges the first task. False leaves it out, as the authors' program for Flan-T5 does (Table 2).
      embedding_copies: how often a T5's token embedding counts and is updated; 3 in that program, which knows it
        under three names.
    """

    scale: float = 0.3
    density: float = number(0.2, at_least=0, at_most=100)
    variant: Variant = "code"
    merge_first: bool = True
    embedding_copies: int = number(1, at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagmaxConfig(ScaledConfig):
    """MagMax-Ind.

    Attributes:
      scale: factor on the entries of largest magnitude; 0.5 for all task counts (Table 9).
      variant: `code` sets D to the running maximum, scaled; `text` adds it at every step (Appendix B.3).
    """

    scale: float = 0.5
    variant: Variant = "code"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WudiConfig(MethodConfig):
    """WUDI-Merging.

    Attributes:
      learning_rate: Adam's; constant (Table 9).
      steps: Adam steps (Table 9): an early stop, on which the result depends.
      variant: `code` optimises every matrix, embeddings included; `text` linear layers alone.
    """

    learning_rate: float = number(1e-5, above=0)
    steps: int = 50
    variant: Variant = "code"


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsoCConfig(ScaledConfig):
    """Iso-C, isotropic merging.

    Attributes:
      scale: factor on the isotropic sum; 1 in the authors' settings, absent from Table 9.
    """

    scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnotsConfig(ScaledConfig):
    """KnOTS-TIES.

    Attributes:
      scale: factor on what is added; 0.3 for 8 tasks, 0.1 for 14 and 20 in the authors' settings.
      density: share of the entries that trimming keeps, as in `TiesConfig`.
      cutoff: singular values up to this are dropped.
    """

    scale: float = 0.3
    density: float = number(0.2, at_least=0, at_most=100)
    cutoff: float = number(1e-4, at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TsvMConfig(ScaledConfig):
    """TSV-M, merging by task singular vectors.

    Attributes:
      scale: factor on the merged vector; 1 in the authors' settings, absent from Table 9.
    """

    scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpcmConfig(MethodConfig):
    """OPCM, orthogonal projection.

    Attributes:
      alpha: share of the nuclear norm of D whose directions the new task may not touch (Table 9). At 1, rounding
        would decide.
      mask_diagonal: also removes the diagonal beyond the leading block, which the authors' program means to do and
        does not.
      skip_class_embedding: adds no task to a CLIP's class embedding, as the authors' program does by accident: it
        keeps the first task's, rescaled.
      embedding_copies: how often a T5's token embedding counts in the norms; 3 in the authors' program.
    """

    alpha: float = number(0.5, at_least=0, below=1)
    mask_diagonal: bool = False
    skip_class_embedding: bool = True
    embedding_copies: int = number(1, at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningConfig(MethodConfig):
    """What the methods share that learn from unlabelled examples (Table 9).

    Attributes:
      learning_rate: Adam's; constant; 1e-3 for Flan-T5 in the authors' settings.
      steps: Adam steps; 100 for Flan-T5.
      batch_size: examples per step; 8 for Flan-T5.
      examples_per_class: size of the seed set.
      entropy: of each example's prediction, or of the batch's mean logits, as the authors' program for Flan-T5 does.
    """

    learning_rate: float = number(1e-4, above=0)
    steps: int = 50
    batch_size: int = number(16, at_least=1)
    examples_per_class: int = number(5, at_least=1)
    entropy: Entropy = "of_each"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaMergingConfig(LearningConfig):
    """Layer-wise AdaMerging: one coefficient per tensor, trained on unlabelled examples.

    Attributes:
      init: start of every coefficient (Table 9).
      variant: `code` starts from the backbone with the newest task alone; `text` adds to what is merged (§3.2).
    """

    init: float = 0.3
    variant: Variant = "code"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WemoeConfig(LearningConfig):
    """LoRA-WEMoE: attention by task arithmetic, feed-forward weights as gated low-rank experts.

    Attributes:
      scale: factor on the attention's task vectors, and start of the gates (Table 9).
      first_rank: r_l of the first task's experts (Table 9).
      later_rank: of all later ones. Table 9 says 64; the authors' program takes 16, and Table 5 counts so.
    """

    scale: float = 0.3
    first_rank: int = 64
    later_rank: int = 16
