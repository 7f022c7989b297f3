"""Lays the grid out over a model: its stacks, what memory they take, and so its windows."""

import math

import jax

from nufilt_jax.anatomy import shape_in
from nufilt_jax.checkpoints import Checkpoint
from nufilt_jax.engine.factors import ranks_of
from nufilt_jax.engine.grid import Stack, Window
from nufilt_jax.engine.job import Job
from nufilt_jax.engine.memory import (
    Memory,
    Reach,
    Sizes,
    device_memory,
    largest_on_device,
    plan_windows,
    workspace,
)
from nufilt_jax.linalg.dispatch import chunk_size, layers_at_once, layers_by_products
from nufilt_jax.methods import find
from nufilt_jax.methods.selection import Selection
from nufilt_jax.methods.stacked import stack_names
from nufilt_jax.output.stored import Stored


def lay_out(
    job: Job, base: Checkpoint, tasks: tuple[Checkpoint, ...], selection: Selection, stored: Stored
) -> tuple[list[Window], Memory]:
    """The grid's rows, and the memory that it takes.

    Raises:
      ConfigError: no windows are small enough.
    """
    rule, config = find(job.settings.method), job.settings.config
    shapes = {name: shape_in(base.tensors, name) for name in selection.layers + selection.other}
    ranks = ranks_of(job, base, tasks, selection, stored)
    stacks = list[Stack]()
    for names, is_solved in ((selection.layers, True), (selection.other, False)):
        for members in stack_names(shapes, names, ranks):
            shape, own = shapes[members[0]], ranks.get(members[0])
            most, fewest = (1, 1)
            if is_solved and len(shape) == 2:
                is_large = rule.by_products and own is None
                most, fewest = layers_by_products(math.prod(shape)) if is_large else layers_at_once(), 2
            stacks.append(Stack(members, shape, chunk_size(len(members), most), most, fewest, is_solved, own))
    # Where every number is treated by itself no program works on whole matrices; factors are multiplied by all.
    programs = [
        x for x in stacks if x.is_solved and (x.ranks is not None or (rule.on_matrices and not rule.elementwise))
    ]
    runs_model = job.evaluation is not None or rule.needs_data
    everything = [info for model in (base, *tasks) for info in model.stored]
    sizes = Sizes(
        workspace=max((workspace(x.shape, x.chunk, config, x.ranks) for x in programs), default=0),
        tensor=max((4 * base.tensors[name].size for name in selection.touched), default=0),
        stored=max((info.nbytes for info in everything), default=0),
        model=sum(4 * info.size for info in base.tensors.values()) if runs_model else 0,
    )
    # Of simulated devices, what lies on them is in the same memory: D and τ once more.
    copies = 2 if job.devices > 1 and rule.spreads and jax.default_backend() == "cpu" else 0
    reach = Reach(rule.states, rule.workspace + copies, rule.whole_model)
    if (there := device_memory()) is not None:
        sharing = job.devices if rule.spreads else 1
        there = sharing * min(there, job.max_memory or there)
        reach = reach._replace(on_device=largest_on_device(there, programs, config, reach))
    agreed = job.agreed
    return plan_windows(
        stacks,
        sizes,
        reach,
        job.max_memory,
        stored.done,
        stored.next_number,
        n_tasks=len(job.sources),
        free=agreed.free,
        at_least=agreed.processes,
    )
