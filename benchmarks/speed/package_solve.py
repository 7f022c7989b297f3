"""The package's solve as the benchmarks run it: task after task, and stage by stage."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import measure, shapes
from benchmarks.common.counting import counted
from benchmarks.common.measure import Times
from benchmarks.common.shapes import Inputs
from nufilt_jax.core import solve
from nufilt_jax.engine import counts
from nufilt_jax.engine.counts import Work
from nufilt_jax.linalg import programs
from nufilt_jax.linalg.dispatch import in_chunks, layers_by_products, run_alone
from nufilt_jax.linalg.grams import GramFactor, gram_of
from nufilt_jax.linalg.stacks import bounds
from nufilt_jax.linalg.subspace import leading_of
from nufilt_jax.methods.nufilt import NufiltConfig
from nufilt_jax.methods.stacked import Group

STAGES = ("decompose D", "decompose τ", "reduce", "adam", "fuse")
DECOMPOSITION = STAGES[:2]

Program = Callable[..., Any]


class Task(NamedTuple):
    """A group's arrays, on the device: stacks of D, stacks of τ, A's starts."""

    merged: tuple[jax.Array, ...]
    task: tuple[jax.Array, ...]
    start: jax.Array


class Stage(NamedTuple):
    """One stage of all groups."""

    compile_seconds: float
    times: Times
    work: Work


def grouped(inputs: Inputs) -> tuple[Group, ...]:
    """The groups that the package solves these layers in."""
    return shapes.grouped({name: x.shape for name, x in inputs.task.items()})


def to_device(inputs: Inputs) -> list[Task]:
    """Puts the arrays on the default device, group by group."""
    return [_group_to_device(group, inputs) for group in grouped(inputs)]


def _group_to_device(group: Group, inputs: Inputs) -> Task:
    merged, task = shapes.stacked(group, inputs.merged), shapes.stacked(group, inputs.task)
    start = np.stack([inputs.start[name] for name in group.names])
    return Task(*jax.device_put((merged, task, start)))


class Merge:
    """A merge in memory, D updated on the device as the package does: θ^m_1 = θ_1, then a solve per task.

    Of one task, it is that task's solve.
    """

    def __init__(self, tasks: list[Inputs], config: NufiltConfig) -> None:
        self._groups = grouped(tasks[0])
        first, *later = (to_device(inputs) for inputs in tasks)
        self._first = [task.merged for task in first]
        self._tasks = [[task._replace(merged=()) for task in groups] for groups in (first, *later)]
        function = programs.Program(
            solve.solve_group, static_argnames=("config", "add", "until_certified"), donate_argnums=0
        )
        how = {"config": config, "add": True}
        self._again = functools.partial(function, **how)
        compiled = [measure.compile_it(function, *task, **how, until_certified=False) for task in first]
        self._programs = [program for program, _ in compiled]
        self.compile_seconds = sum(seconds for _, seconds in compiled)

    def times(self, repeats: int) -> Times:
        """Seconds of whole merges, after one that does not count."""
        seconds = []
        for _ in range(repeats + 1):
            merged = self._start()
            seconds += measure.time_it(lambda merged=merged: self._run(merged), 1, warm_up=False).seconds
        return Times(tuple(seconds[1:]))

    def results(self) -> tuple[dict[str, np.ndarray], int]:
        """Merges once: what it added to D by name, on the host, and how many layers of the last task needed no SVD.

        Raises:
          ArithmeticError: an update is not finite.
        """
        found = self._run(self._start())
        if not all(bool(jnp.all(solution.ok)) for solution in found):
            raise ArithmeticError("an update is not finite")
        updates = {
            name: after - before
            for group, solution, stacks in zip(self._groups, found, self._first, strict=True)
            for names, *pair in zip(group.stacks, solution.updates, stacks, strict=True)
            for name, after, before in zip(names, *map(np.asarray, pair), strict=True)
        }
        return updates, sum(int(jnp.sum(solution.forecast.certified)) for solution in found)

    def _start(self) -> list[tuple[jax.Array, ...]]:
        """D before the first task, to be used up."""
        return jax.block_until_ready(jax.tree.map(jnp.copy, self._first))

    def _run(self, merged: list[Any]) -> list[solve.GroupSolution]:
        """All solves one after another; the last one's solutions."""
        found = []
        for tasks in self._tasks:
            steps = zip(self._programs, merged, tasks, strict=True)
            found = [self._solved(program, d, x) for program, d, x in steps]
            merged = [solution.updates for solution in found]
        return found

    def _solved(self, program: Program, merged: tuple[jax.Array, ...], task: Task) -> solve.GroupSolution:
        """As the package does it: layers without a certificate are solved again."""
        found = run_alone(program, merged, task.task, task.start)
        return solve.mended(found, None, task.task, task.start, self._again)


def stages(tasks: list[Task], config: NufiltConfig, repeats: int, *, count: bool = True) -> dict[str, Stage]:
    """Every stage as programs of its own, fed with what the stage before it gave.

    Args:
      tasks: the arrays of all groups.
      config: ranks, steps and route.
      repeats: timed runs of each.
      count: also count their work; that of the decompositions takes about as long to compile as they do.
    """
    slices = [part for task in tasks for part in _slices(task)]
    functions = _stage_functions(config)
    inputs: list[list[Any]] = [[] for _ in slices]  # results of the stages so far, slice by slice
    found = {}
    for name, (function, takes) in functions.items():
        args = [takes(part, done) for part, done in zip(slices, inputs, strict=True)]
        compiled = [measure.compile_it(jax.jit(_as_solved(function)), *x) for x in args]
        calls = [(program, x) for (program, _), x in zip(compiled, args, strict=True)]

        def run(calls: list[tuple[Program, Any]] = calls) -> list[Any]:
            return [run_alone(program, *x) for program, x in calls]

        for done, result in zip(inputs, run(), strict=True):
            done.append(result)
        times = measure.time_it(run, repeats, warm_up=False)
        work = _count(name, slices, config, function, args) if count else Work()
        found[name] = Stage(sum(seconds for _, seconds in compiled), times, work)
    return found


def _slices(task: Task) -> list[Task]:
    """What the package solves at once: on a CPU one stack, elsewhere the whole group."""
    if jax.default_backend() != "cpu":
        return [task]
    return [
        Task((d,), (t,), task.start[i:j])
        for d, t, (i, j) in zip(task.merged, task.task, bounds(task.merged), strict=True)
    ]


def _as_solved(function: Program) -> Program:
    """On a CPU a few layers at a time, as the package does."""
    if jax.default_backend() != "cpu":
        return function

    def chunked(*arrays: Any) -> Any:
        numbers = max(leaf[0].size for leaf in jax.tree.leaves(arrays))
        return in_chunks(function, arrays, layers_by_products(numbers))

    return chunked


def _stage_functions(config: NufiltConfig) -> dict[str, tuple[Program, Callable[[Task, list[Any]], tuple]]]:
    """Each stage, and which arrays and earlier results it takes."""

    def new_directions(task: Any) -> tuple[Any, Any]:
        grams = gram_of(task)
        return grams, leading_of(task, config.task_rank, config.decomposition, grams)

    prior_directions = functools.partial(leading_of, rank=config.filter_rank, decomposition=config.decomposition)
    train = functools.partial(solve.train, config=config)
    return dict(
        zip(
            STAGES,
            (
                (prior_directions, lambda x, done: (x.merged,)),
                (new_directions, lambda x, done: (x.task,)),
                (solve.reduce, lambda x, done: (x.merged, x.task, done[1][0], done[0], done[1][1])),
                (train, lambda x, done: (done[2][1], x.start)),
                (solve.fuse_updates, lambda x, done: (x.task, done[2][0], done[3][0])),
            ),
            strict=True,
        )
    )


def _count(name: str, slices: list[Task], config: NufiltConfig, function: Program, args: list[Any]) -> Work:
    """By formula; a decomposition by running it with counters."""
    if name in DECOMPOSITION:
        return counts.total(counted(_as_solved(function), *x) for x in args)
    return counts.total(_count_of_part(name, part, config) for part in slices)


def _count_of_part(name: str, part: Task, config: NufiltConfig) -> Work:
    formula: Callable[..., Work] = counts.fuse_count
    if name != "fuse":
        of_stage = {"reduce": counts.reduce_count, "adam": counts.adam_count}[name]
        factored = isinstance(jax.eval_shape(gram_of, part.task), GramFactor)
        formula = functools.partial(of_stage, factored=factored)
    sizes = [x.shape for x in part.merged]
    return counts.total(formula(m, n, config).times(layers) for layers, m, n in sizes)
