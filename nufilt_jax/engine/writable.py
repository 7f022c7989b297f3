"""What would keep the result of a merge from being written, found before any work."""

import os
from collections.abc import Mapping
from pathlib import Path

from nufilt_jax.checkpoints import Checkpoint
from nufilt_jax.checkpoints.beside import not_to_copy
from nufilt_jax.checkpoints.dtypes import OUTPUT_DTYPES
from nufilt_jax.checkpoints.folders import FLAX
from nufilt_jax.checkpoints.names import has_flax_form
from nufilt_jax.checkpoints.outputs import plan_shards
from nufilt_jax.config import problem
from nufilt_jax.errors import CheckpointError, Problem
from nufilt_jax.output.recipe import Settings


def writing_problems(
    base: Checkpoint, settings: Settings, out: Path | None, tasks: Mapping[str, Checkpoint] | None = None
) -> list[Problem]:
    """What is wrong with the form that is asked for, and with a place that is a model's own, or inside the base's.

    Args:
      base: whose names, sharding and other files are taken.
      settings: how it is written.
      out: the output folder; None if only a plan is wanted.
      tasks: those still to be merged, by name, which may be folders.

    Raises:
      CheckpointError: files of the base that cannot be copied, or weights that cannot be converted.
    """
    kind = settings.format or base.format
    if kind == FLAX != base.format and not has_flax_form(base.config):
        what = f"{base.source} is a {base.config.get('model_type')!r} model, which has no Flax form"
        return [problem("format", what, "use safetensors")]
    if base.is_local and settings.output != "adapter" and (kept_out := not_to_copy(base.path)):
        raise CheckpointError(*kept_out)
    plan_shards(base, kind, OUTPUT_DTYPES[settings.dtype] if settings.dtype else None)
    if out is None:
        return []
    if base.is_local and os.path.realpath(out).startswith(os.path.realpath(base.path) + os.sep):
        what = f"{out} lies inside the base's folder, whose files are copied"
        return [problem("out", what, "choose a folder beside it")]
    what, fix = "is the output folder itself, which the merge would replace", "give a copy of it"
    found = [problem("task", f"{name} {what}", fix) for name, task in (tasks or {}).items() if _is_at(task, out)]
    return [problem("base", f"{base.source} {what}", fix), *found] if _is_at(base, out) else found


def _is_at(model: Checkpoint, out: Path) -> bool:
    return model.is_local and os.path.realpath(model.path) == os.path.realpath(out)
