"""The options of the commands, as parsed and not yet understood. Imports nothing heavy: `--help` is quick.

An option is two lines of its class: its field, and what it means in the docstring. `add`, `plan`, the configuration
file, `nufilt init` and the reference of the command line take it from there.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

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


def _own_rule(_: Any, tokens: Sequence[Token]) -> str:
    """Imports a rule of the user's own, which a recipe names and never imports.

    Raises:
      UsageError: it is a rule of the package, which the recipe tells.
      ConfigError: there is no such module or rule in it.
    """
    from nufilt_jax.methods import load_own  # with JAX

    token = tokens[0]
    if ":" not in token.value:
        raise UsageError(Problem(str(token.keyword), f"must be MODULE:RULE, got {shown(token.value)}"))
    return load_own(token.value).name


_MODELS = Parameter(group=Group.create_ordered("Models"))
_METHOD = Parameter(group=Group.create_ordered("Method"))
_EVALUATION = Parameter(group=Group.create_ordered("Evaluation"))
_OUTPUT = Parameter(group=Group.create_ordered("Output and running"))
Whole = Annotated[int | None, Parameter(converter=_whole_number)]
Number = Annotated[float | None, Parameter(converter=_number)]
AnyPath = Annotated[Path | None, Parameter(converter=home_expanded)]
_OWN_RULE = "As MODULE:RULE, if a rule of your own made the merge: a recipe imports no module."
OwnRule = Annotated[str | None, Parameter(name="--method", converter=_own_rule, show_default=False, help=_OWN_RULE)]
Flag = Annotated[bool, Parameter(negative="", show_default=False), _OUTPUT]
Verbose = Annotated[bool, Parameter(name=("--verbose", "-v"), negative="", show_default=False), _OUTPUT]


def _default(text: str) -> Parameter:
    """What takes the place of an option left out, for the help; the settings' own class holds the value."""
    return Parameter(show_default=text)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line; what an option leaves out is None.

    Attributes:
      config: Take options from this file (toml, yaml, json, or a merge's nufilt.json); the command line wins.
      model: A preset: tiny (built in, needs no network), vit-b32, vit-b16, vit-l14, flan-t5-base; or llava-1.5-7b, with
        your own --task models (Table 3 of the paper: IconQA, ImageNet captions, ScienceQA, VizWiz captions).
      group: Size of the preset's task group: 8, 14 or 20.
      order: The paper's k-th order of the tasks, or "given".
      preset_table: With flan-t5-base: 2 takes the settings that reproduce Table 2 of the paper.
      base: The pre-trained model: a folder or Hub id, as PATH_OR_HUB[@REV].
      task: A fine-tuned model, as NAME=PATH_OR_HUB[@REV]; once per task, in order.
      out: The output folder.
      add: Continue the finished or interrupted merge in this folder, with one more --task.
      method: How to merge; help lists all methods, help=NAME tells of one; MODULE:RULE is one of your own.
      method_args: Settings of the method, as KEY=VALUE ...
      data: Folder with unlabelled examples of each task, for the methods that learn from them: NAME.safetensors.
      filter_rank: Directions of earlier tasks that a new task may not touch (r_p).
      adapter_rank: Rank of the trained correction (r_l).
      task_rank: Directions of the new task whose answer should stay (r_v).
      steps: Number of Adam steps that train the correction.
      learning_rate: Learning rate of Adam.
      decomposition: How spectra are found: auto, eigh, svd or subspace.
      solver: adam trains the correction; closed_form writes it down.
      seed: Seed of the correction's random start.
      layers: Merge the matrices in whose names this regular expression is found.
      conv: Convolutions inside blocks are matrices too.
      strict: Refuse tasks of which a head or a vocabulary would stay the base's.
      other_params: What becomes of all other parameters: pretrained, first or average.
      evaluate: Measure the merged model on all tasks after every step.
      tasks_file: JSON file that describes tasks, beside those known by name.
      heads_from: CLIP model whose text tower makes the zero-shot heads; without it, the base's own.
      limit: At most so many examples of each task, for a quick look.
      dtype: Type of the stored weights: float32, bfloat16 or float16.
      format: Format of the weight files: safetensors or flax.
      output: What is written: model, or adapter: of tasks that are all adapters, a LoRA folder for peft.
      adapter_out_rank: Most rank of the adapter that is written.
      max_memory: Most memory that the run may take, as 8GB (10^9) or 8GiB (2^30).
      devices: So many devices of this machine share the layers, or "all".
      distributed: One of several processes that share a file system and the work: under SLURM, Open MPI or on a TPU
        pod slice as it stands, elsewhere with the three options that follow.
      coordinator: HOST:PORT where the first process listens.
      processes: Number of processes.
      process: Number of this one, from 0.
      offline: Never ask the Hub; use its local cache.
      plan: Say what would be done, from headers alone, and write nothing.
      json: One JSON document on stdout and nothing else there.
      quiet: Nothing but warnings and errors.
      verbose: A line on stderr for everything that is done, programs compiled included.
    """

    config: Annotated[AnyPath, _MODELS] = None
    model: Annotated[str | None, _MODELS] = None
    group: Annotated[Whole, _MODELS, _default("8")] = None
    order: Annotated[str | None, _MODELS, _default("given; CLIP presets 1")] = None
    preset_table: Annotated[Whole, _MODELS] = None
    base: Annotated[str | None, _MODELS] = None
    task: Annotated[tuple[str, ...], Parameter(consume_multiple=False, negative="", show_default=False), _MODELS] = ()
    out: Annotated[AnyPath, _MODELS] = None
    add: Annotated[AnyPath, _MODELS] = None
    method: Annotated[str | None, _METHOD, _default("nufilt")] = None
    method_args: Annotated[
        tuple[str, ...], Parameter(consume_multiple=True, negative="", show_default=False), _METHOD
    ] = ()
    data: Annotated[AnyPath, _METHOD] = None
    filter_rank: Annotated[Whole, _METHOD, _default("128")] = None
    adapter_rank: Annotated[Whole, _METHOD, _default("64")] = None
    task_rank: Annotated[Whole, _METHOD, _default("8")] = None
    steps: Annotated[Whole, _METHOD, _default("50")] = None
    learning_rate: Annotated[Number, _METHOD, _default("1e-3")] = None
    decomposition: Annotated[str | None, _METHOD, _default("auto")] = None
    solver: Annotated[str | None, _METHOD, _default("adam")] = None
    seed: Annotated[Whole, _METHOD, _default("0")] = None
    layers: Annotated[str | None, _METHOD] = None
    conv: Annotated[bool, Parameter(negative="", show_default=False), _METHOD] = False
    strict: Annotated[bool, Parameter(negative="", show_default=False), _METHOD] = False
    other_params: Annotated[str | None, _METHOD, _default("pretrained")] = None
    evaluate: Annotated[bool, Parameter(negative="", show_default=False), _EVALUATION] = False
    tasks_file: Annotated[AnyPath, _EVALUATION] = None
    heads_from: Annotated[str | None, _EVALUATION] = None
    limit: Annotated[Whole, _EVALUATION] = None
    dtype: Annotated[str | None, _OUTPUT, _default("the base's own")] = None
    format: Annotated[str | None, _OUTPUT, _default("the base's own")] = None
    output: Annotated[str | None, _OUTPUT, _default("model")] = None
    adapter_out_rank: Annotated[Whole, _OUTPUT, _default("the ranks of the tasks added up")] = None
    max_memory: Annotated[str | None, _OUTPUT, _default("half of what is free")] = None
    devices: Annotated[str | None, Parameter(converter=_whole_or_all), _OUTPUT, _default("1")] = None
    distributed: Flag = False
    coordinator: Annotated[str | None, _OUTPUT] = None
    processes: Annotated[Whole, _OUTPUT] = None
    process: Annotated[Whole, _OUTPUT] = None
    offline: Flag = False
    plan: Flag = False
    json: Flag = False
    quiet: Flag = False
    verbose: Verbose = False

    def config_flags(self) -> dict[str, Any]:
        """The options given that are settings of some method, by field name."""
        names = ("filter_rank", "adapter_rank", "task_rank", "steps", "learning_rate", "decomposition", "solver")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


# A description is one paragraph, which the help wraps anew.
Arguments.__doc__ = re.sub(r"\n {8}", " ", Arguments.__doc__ or "")


def _like_merge(name: str, *, left_out: tuple[str, ...], hidden: tuple[str, ...] = ()) -> Any:
    """The options of a command that takes those of `merge` but for a few; what is hidden, help does not tell of.

    Where the settings are, there is the method; one of the user's own has to be named all the same.
    """
    fields = []
    for field in dataclasses.fields(Arguments):
        hint: Any = field.type
        if field.name in hidden:
            own = Parameter(show_default=False, help=_OWN_RULE)
            hint = Annotated[hint, own if field.name == "method" else Parameter(show=False)]
        if field.name not in left_out:
            fields.append((field.name, hint, dataclasses.field(default=field.default)))
    namespace = {"__doc__": Arguments.__doc__, "__module__": __name__}
    made = dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True, namespace=namespace)
    return Parameter(name="*")(made)


OF_ONE_PROCESS = ("distributed", "coordinator", "processes", "process")  # and of no plan or configuration file
# A merge under way keeps its models and settings: any other is refused, with both values.
_OF_A_NEW_MERGE = (
    *("model", "group", "order", "preset_table", "base", "out", "method", "method_args"),
    *("filter_rank", "adapter_rank", "task_rank", "steps", "learning_rate", "decomposition", "solver", "seed"),
    *("layers", "conv", "other_params", "dtype", "format", "output", "adapter_out_rank"),
)
if TYPE_CHECKING:
    AddArguments = PlanArguments = Arguments
else:
    AddArguments = _like_merge("AddArguments", left_out=("config", "add"), hidden=_OF_A_NEW_MERGE)
    PlanArguments = _like_merge("PlanArguments", left_out=("plan", *OF_ONE_PROCESS))


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """The options of `evaluate`.

    Attributes:
      config: Take options from this file (toml, yaml, json), a merge's own too; the command line wins.
      task: Name of a task; once per task. Without it, all that were merged.
      tasks_file: JSON file that describes tasks, beside those known by name.
      heads_from: CLIP model whose text tower makes the zero-shot heads; without it, the model's own.
      limit: At most so many examples of each task, for a quick look.
      dtype: In which the forward passes compute: float32 or bfloat16.
      offline: Never ask the Hub; use its local caches.
      json: One JSON document on stdout and nothing else there.
      quiet: Nothing but warnings and errors.
    """

    config: Annotated[AnyPath, _EVALUATION] = None
    task: Annotated[
        tuple[str, ...], Parameter(consume_multiple=False, negative="", show_default=False), _EVALUATION
    ] = ()
    tasks_file: Annotated[AnyPath, _EVALUATION] = None
    heads_from: Annotated[str | None, _EVALUATION] = None
    limit: Annotated[Whole, _EVALUATION] = None
    dtype: Annotated[str | None, _EVALUATION, _default("float32")] = None
    method: OwnRule = None
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
    method: OwnRule = None
    json: Flag = False
    quiet: Flag = False


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PushArguments:
    """The options of `push`.

    Attributes:
      dry_run: Say what would be uploaded, and upload nothing; the Hub is not asked.
      private: Make the repository a private one, if there is none yet.
      with_state: Upload state/ too: others can then add tasks. It takes about as much as the model in float32.
      message: Message of the commit.
      json: One JSON document on stdout and nothing else there.
      quiet: Nothing but warnings and errors.
    """

    dry_run: Flag = False
    private: Flag = False
    with_state: Flag = False
    message: Annotated[str | None, _OUTPUT, _default("what was merged")] = None
    method: Annotated[OwnRule, _OUTPUT] = None
    json: Flag = False
    quiet: Flag = False
