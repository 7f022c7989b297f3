"""The options of `merge`, as parsed and not yet understood. Imports nothing heavy: `--help` is quick."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cyclopts import Group, Parameter, Token

from nufilt_jax.errors import Problem, UsageError
from nufilt_jax.strict_json import shown

T = TypeVar("T")


def _whole_number(_: Any, tokens: Sequence[Token]) -> int:
    return _read(tokens[0], int, "a whole number")  # cyclopts' own rounds 1.5 to 2 without a word


def _whole_or_all(_: Any, tokens: Sequence[Token]) -> str:
    text = tokens[0].value
    return text if text == "all" else str(_read(tokens[0], int, 'a whole number or "all"'))


def _number(_: Any, tokens: Sequence[Token]) -> float:
    return _read(tokens[0], float, "a number")


def _read(token: Token, kind: Callable[[str], T], expected: str) -> T:
    try:
        return kind(token.value)
    except ValueError:
        raise UsageError(Problem(str(token.keyword), f"must be {expected}, got {shown(token.value)}")) from None


def home_expanded(_: Any, tokens: Sequence[Token]) -> Path:
    """A path; behind an equals sign, and in quotes, the shell leaves a `~` alone.

    Raises:
      UsageError: it begins with `~`, and there is no such home folder.
    """
    text = tokens[0].value
    path = os.path.expanduser(text)
    if path.startswith("~") and not os.path.lexists(path.split(os.sep)[0]):
        where = str(tokens[0].keyword or "")
        raise UsageError(Problem(where, f"{text}: there is no such home folder", "write the path out, or as ./~"))
    return Path(path)


_METHOD = Parameter(group=Group("Method"))
_EVALUATION = Parameter(group=Group("Evaluation"))
_OUTPUT = Parameter(group=Group("Output and running"))
Whole = Annotated[int | None, Parameter(converter=_whole_number)]
Number = Annotated[float | None, Parameter(converter=_number)]
AnyPath = Annotated[Path | None, Parameter(converter=home_expanded)]
Flag = Annotated[bool, Parameter(negative="", show_default=False), _OUTPUT]


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line; what an option leaves out is None.

    Attributes:
      model: A preset: tiny (built in, needs no network), vit-b32, vit-b16, vit-l14, flan-t5-base; or llava-1.5-7b, with
        your own --task models (Table 3 of the paper: IconQA, ImageNet captions, ScienceQA, VizWiz captions).
      group: Size of the preset's task group: 8, 14 or 20. Without it, 8.
      order: The paper's k-th order of the tasks, or "given". CLIP presets: 1. All else: given.
      preset_table: With flan-t5-base: 2 takes the settings that reproduce Table 2 of the paper.
      base: The pre-trained model: a folder or Hub id, as PATH_OR_HUB[@REV].
      task: A fine-tuned model, as NAME=PATH_OR_HUB[@REV]; once per task, in order.
      out: The output folder.
      add: Continue the finished or interrupted merge in this folder, with one more --task.
      method: nufilt, or another: help lists them all.
      method_args: Settings of the method, as KEY=VALUE ...
      data: Folder with unlabelled examples of each task, for the methods that learn from them: NAME.safetensors.
      filter_rank: Directions of earlier tasks that a new task may not touch (r_p).
      adapter_rank: Rank of the trained correction (r_l).
      task_rank: Directions of the new task whose answer should stay (r_v).
      steps: Adam steps.
      learning_rate: Of Adam.
      decomposition: auto, eigh, svd or subspace.
      solver: adam trains the correction; closed_form writes it down.
      seed: Of the correction's random start.
      layers: Merge the matrices in whose names this regular expression is found.
      conv: Convolutions inside blocks are matrices too.
      strict: Refuse tasks of which a head or a vocabulary would stay the base's.
      other_params: All other parameters: pretrained, first or average.
      evaluate: Measure the merged model on all tasks after every step.
      tasks_file: JSON file that describes tasks, beside those known by name.
      heads_from: CLIP model whose text tower makes the zero-shot heads; without it, the base's own.
      limit: At most so many examples of each task, for a quick look.
      dtype: Type of the stored weights: float32, bfloat16 or float16. Without it, the base's own.
      format: safetensors or flax. Without it, the base's own.
      max_memory: Most memory that the run may take, as 8GB (10^9) or 8GiB (2^30). Without it, half of what is free.
      devices: So many devices of this machine share the layers, or "all". Without it, 1.
      offline: Never ask the Hub; use its local cache.
      plan: Say what would be done, from headers alone, and write nothing.
      json: One JSON document on stdout and nothing else there.
      quiet: Nothing but warnings and errors.
    """

    model: str | None = None
    group: Whole = None
    order: str | None = None
    preset_table: Whole = None
    base: str | None = None
    task: Annotated[tuple[str, ...], Parameter(consume_multiple=False, negative="", show_default=False)] = ()
    out: AnyPath = None
    add: AnyPath = None
    method: Annotated[str | None, _METHOD] = None
    method_args: Annotated[
        tuple[str, ...], Parameter(consume_multiple=True, negative="", show_default=False), _METHOD
    ] = ()
    data: Annotated[AnyPath, _METHOD] = None
    filter_rank: Annotated[Whole, _METHOD] = None
    adapter_rank: Annotated[Whole, _METHOD] = None
    task_rank: Annotated[Whole, _METHOD] = None
    steps: Annotated[Whole, _METHOD] = None
    learning_rate: Annotated[Number, _METHOD] = None
    decomposition: Annotated[str | None, _METHOD] = None
    solver: Annotated[str | None, _METHOD] = None
    seed: Annotated[Whole, _METHOD] = None
    layers: Annotated[str | None, _METHOD] = None
    conv: Annotated[bool, Parameter(negative="", show_default=False), _METHOD] = False
    strict: Annotated[bool, Parameter(negative="", show_default=False), _METHOD] = False
    other_params: Annotated[str | None, _METHOD] = None
    evaluate: Annotated[bool, Parameter(negative="", show_default=False), _EVALUATION] = False
    tasks_file: Annotated[AnyPath, _EVALUATION] = None
    heads_from: Annotated[str | None, _EVALUATION] = None
    limit: Annotated[Whole, _EVALUATION] = None
    dtype: Annotated[str | None, _OUTPUT] = None
    format: Annotated[str | None, _OUTPUT] = None
    max_memory: Annotated[str | None, _OUTPUT] = None
    devices: Annotated[str | None, Parameter(converter=_whole_or_all), _OUTPUT] = None
    offline: Flag = False
    plan: Flag = False
    json: Flag = False
    quiet: Flag = False

    def config_flags(self) -> dict[str, Any]:
        """The options given that are settings of some method, by field name."""
        names = ("filter_rank", "adapter_rank", "task_rank", "steps", "learning_rate", "decomposition", "solver")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """The options of `evaluate`.

    Attributes:
      task: Name of a task; once per task. Without it, all that were merged.
      tasks_file: JSON file that describes tasks, beside those known by name.
      heads_from: CLIP model whose text tower makes the zero-shot heads; without it, the model's own.
      limit: At most so many examples of each task, for a quick look.
      dtype: In which the forward passes compute: float32 or bfloat16. Without it, float32.
      offline: Never ask the Hub; use its local caches.
      json: One JSON document on stdout and nothing else there.
      quiet: Nothing but warnings and errors.
    """

    task: Annotated[tuple[str, ...], Parameter(consume_multiple=False, negative="", show_default=False)] = ()
    tasks_file: AnyPath = None
    heads_from: str | None = None
    limit: Whole = None
    dtype: str | None = None
    offline: Flag = False
    json: Flag = False
    quiet: Flag = False


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalyzeArguments:
    """The options of `analyze`.

    Attributes:
      images: Images of each task to measure on, where there are any.
      tasks_file: JSON file that describes tasks, beside those known by name.
      json: One JSON document on stdout and nothing else there.
      quiet: Nothing but warnings and errors.
    """

    images: Annotated[int, Parameter(converter=_whole_number)] = 256
    tasks_file: AnyPath = None
    json: Flag = False
    quiet: Flag = False
