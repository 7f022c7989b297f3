"""What a merge would do, and everything that speaks against it, from headers alone."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nufilt_jax.anatomy import tensor_of
from nufilt_jax.checkpoints import Checkpoint, open_checkpoint, open_task
from nufilt_jax.config import problem
from nufilt_jax.engine.devices import idle_devices
from nufilt_jax.engine.factors import output_problems, output_warnings
from nufilt_jax.engine.grid import Direction, Stack, Window
from nufilt_jax.engine.job import EvaluationOptions, Job, Recorded, lacking_state, other_merge_problems, recorded_in
from nufilt_jax.engine.layout import lay_out
from nufilt_jax.engine.memory import Memory
from nufilt_jax.engine.placing import place_problems
from nufilt_jax.engine.readable import fitted, selected
from nufilt_jax.engine.writable import writing_problems
from nufilt_jax.errors import ConfigError, OutputError, Problem, error_of, gathering, of_kind
from nufilt_jax.methods import find
from nufilt_jax.methods.selection import Selection
from nufilt_jax.output.place import OutputPlace
from nufilt_jax.output.recipe import Model, Settings
from nufilt_jax.output.stored import Stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A merge that can begin.

    Attributes:
      base: the backbone.
      sources: all tasks in order, those merged earlier included.
      tasks: the checkpoints opened, by task name: all, or under --add those still to be merged.
      settings: how.
      selection: the tensors touched.
      rows: the windows of the grid, with all layers of the selection.
      memory: what the run may take, and what it will take.
      examples: the files with examples of the tasks still to be merged, by task name; none for most methods.
      evaluation: how the merged model is evaluated after every step; None if it is not.
      devices: so many share the layers of a window.
      out: the output folder; None if only a plan is wanted.
      recorded: the same merge, as far as an earlier run came; None if there is none.
      promised: the base and the tasks, with the hashes that they should have where those are known.
      warnings: what the user should know and may accept.
    """

    base: Checkpoint
    sources: tuple[Model, ...]
    tasks: Mapping[str, Checkpoint]
    settings: Settings
    selection: Selection
    rows: tuple[Window, ...]
    memory: Memory
    examples: Mapping[str, Path]
    evaluation: EvaluationOptions | None
    devices: int
    out: Path | None
    recorded: Recorded | None
    promised: tuple[Model, ...]
    warnings: tuple[str, ...]

    @property
    def merged_layers(self) -> tuple[str, ...]:
        """The selected layers, but for those that stay the base's because no task has them in the base's size."""
        tensors, tasks = self.base.tensors, self.tasks.values()
        stay = {n for n in self.selection.touched if tasks and all(task.tensors[n] is tensors[n] for task in tasks)}
        before = self.recorded.stored if self.recorded and len(tasks) < len(self.sources) else None
        # Of tasks that are not at hand, the ranks tell.
        return tuple(x for x in self.selection.layers if tensor_of(x) not in stay or (before and before.rank(x) != 0))

    @property
    def done(self) -> int:
        """Number of tasks that earlier runs have merged."""
        return self.recorded.done if self.recorded else 0

    @property
    def is_finished(self) -> bool:
        """Whether the model that is asked for stands in its place already."""
        return self.recorded is not None and self.recorded.is_written and self.done == len(self.sources)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The layers that the method works on, window by window."""
        return tuple(stack for row in self.rows for stack in row.stacks if stack.is_solved)

    def n_looks(self, task: int) -> int:
        """Number of looks at the whole model before a task; of one window a rule finds all numbers itself."""
        return len(find(self.settings.method).looks(task)) if len(self.rows) > 1 else 0

    @property
    def walk(self) -> Direction:
        """Row by row, unless the whole model is wanted after each step, or numbers of it before."""
        needs_model = self.evaluation is not None or bool(self.examples)
        return "columns" if needs_model or find(self.settings.method).survey else "rows"


def make_plan(job: Job, *, offline: bool = False, headers_only: bool = False) -> Plan:
    """Opens everything and checks that it fits together.

    Args:
      job: what is asked for.
      offline: use the local Hub cache alone.
      headers_only: download no weights; and look at the output's place, which a merge has locked before.

    Raises:
      NufiltError: with every problem of base, tasks, settings and output folder at once.
    """
    problems = [*job.problems, *_name_problems(job.sources)]
    place = None if job.out is None else OutputPlace(job.out)
    recorded = job.continues or _recorded(job, place, problems)
    stored = recorded.stored if recorded is not None and recorded.has_begun else Stored()
    base, tasks = _open_all(job, problems, offline=offline, headers_only=headers_only)
    selection, examples, notices = Selection((), ()), {}, list[str]()
    rows, memory = list[Window](), None
    if base is not None:
        notices += base.notices
        if _has_forward(job, base, problems):
            with gathering(problems):
                selection = selected(base, tasks.values(), job.settings)
            with gathering(problems):
                examples = _examples(job, base, tuple(tasks), problems)
        tasks, told = fitted(base, tasks, selection, job.settings, problems, strict=job.strict)
        notices += told
        with gathering(problems):
            problems += of_kind(ConfigError, _evaluation_problems(job, base))
        with gathering(problems):
            problems += output_problems(tasks, job.settings, selection, is_first=recorded is None)
            problems += writing_problems(base, job.settings, None if place is None else place.out, tasks)
        problems += of_kind(OutputError, _state_problems(recorded, selection, len(job.sources)))
        problems += _process_problems(job)
        with gathering(problems):
            rows, memory = lay_out(job, base, tuple(tasks.values()), selection, stored)
        is_finished = recorded is not None and recorded.is_written and recorded.done == len(job.sources)
        # What is kept of a merge under way, and damaged, the merge itself gives up.
        if recorded is not None and not is_finished and (recorded.is_written or headers_only):
            with gathering(problems):
                stored.look_into(selection.touched)
    if headers_only and place is not None:
        problems += of_kind(OutputError, place_problems(place, rows, len(job.sources)))
    if problems or base is None or memory is None:
        raise error_of(problems)
    return Plan(
        base=base,
        sources=job.sources,
        tasks=tasks,
        settings=job.settings,
        selection=selection,
        rows=tuple(rows),
        memory=memory,
        examples=examples,
        evaluation=job.evaluation,
        devices=job.devices,
        out=None if place is None else place.out,
        recorded=recorded,
        promised=(job.base, *job.sources),
        warnings=(
            *job.warnings,
            *idle_devices(job.devices, job.settings.method),
            *notices,
            *output_warnings(base, tasks, job.settings),
        ),
    )


def _recorded(job: Job, place: OutputPlace | None, problems: list[Problem]) -> Recorded | None:
    """What earlier runs of the same merge have done; another merge in its place is a problem."""
    recorded = None
    with gathering(problems):
        recorded = None if place is None else recorded_in(place)
    if recorded is None or not recorded.has_begun:  # which binds nobody
        return None
    names = [source.name for source in job.sources]
    differing = other_merge_problems(
        recorded.recipe, recorded.folder, job.settings, names, is_written=recorded.is_written
    )
    refused = {problem.where for problem in job.problems}  # which differ as well, and are told once
    problems += of_kind(OutputError, (problem for problem in differing if problem.where not in refused))
    return recorded


def _state_problems(recorded: Recorded | None, selection: Selection, n_tasks: int) -> Iterator[Problem]:
    """A finished merge of which a task is to be added to, and whose state is not whole."""
    if recorded is None or not recorded.is_written or recorded.done == n_tasks:
        return
    stored = recorded.stored
    if lacking := lacking_state(recorded.recipe, stored, recorded.folder):
        yield from lacking
    elif any(stored.done(layer) != recorded.done for layer in selection.layers + selection.other):
        what = "the state of the merge does not hold the tensors that the recipe selects"
        yield Problem(str(recorded.folder), what, "merge again from the start")


def _process_problems(job: Job) -> Iterator[Problem]:
    """A method that several processes cannot work on, each on its own windows."""
    rule = find(job.settings.method)
    if job.agreed.processes > 1 and rule.whole_model:
        what = f"{rule.name} works on the whole model at once, and processes have a part each"
        yield problem("distributed", what, "leave it out")


def _name_problems(sources: tuple[Model, ...]) -> list[Problem]:
    names = [source.name for source in sources]
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    return [problem("task", f"{name} names two tasks", "give each task a name of its own") for name in twice]


def _open_all(
    job: Job, problems: list[Problem], *, offline: bool, headers_only: bool
) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
    """The base, None if it cannot be opened, and the tasks whose files are needed."""
    how: dict[str, Any] = {"offline": offline, "headers_only": headers_only}
    base, tasks = None, {}
    with gathering(problems):
        base = open_checkpoint(job.base.source, revision=job.base.revision, role="base", **how)
    for source in job.sources[job.n_merged :]:
        with gathering(problems):
            tasks[source.name] = open_task(source.source, base, revision=source.revision, **how)
    return base, tasks


def _has_forward(job: Job, base: Checkpoint, problems: list[Problem]) -> bool:
    """Whether a forward pass is known, if the method learns by one: without it nothing else is worth asking for.

    What keeps a known one from running goes to `problems`.
    """
    if not find(job.settings.method).needs_data:
        return True
    from nufilt_jax.engine.examples import forward_problems  # with models, which no other merge needs

    with gathering(problems):
        found = forward_problems(base)
        if getattr(job.settings.config, "steps", None) != 0:  # without a step it is not run
            problems += found
        return True
    return False


def _examples(job: Job, base: Checkpoint, names: tuple[str, ...], problems: list[Problem]) -> dict[str, Path]:
    """The files from which the method learns."""
    if not find(job.settings.method).needs_data:
        return {}
    if job.data is None:
        what = f"is missing: {job.settings.method} learns from examples of each task"
        raise ConfigError(problem("data", what, "give a folder with NAME.safetensors for every task"))
    from nufilt_jax.engine.examples import example_files, example_problems  # with models, which no other merge needs

    files = example_files(job.data, names)
    problems += of_kind(ConfigError, example_problems(files, base))
    return files


def _evaluation_problems(job: Job, base: Checkpoint) -> list[Problem]:
    if job.evaluation is None:
        return []
    from nufilt_jax.engine.evaluation import task_problems  # with models, which no other merge needs

    return task_problems([source.name for source in job.sources], base.config, job.evaluation.tasks_file)
