"""Weights in memory, looked at as those of a folder are."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nufilt_jax.checkpoints.dtypes import AnyArray, code_of
from nufilt_jax.checkpoints.folders import SAFETENSORS
from nufilt_jax.checkpoints.reader import Checkpoint
from nufilt_jax.checkpoints.tensors import HeldTensor
from nufilt_jax.checkpoints.ties import tie
from nufilt_jax.errors import CheckpointError, raise_all
from nufilt_jax.values import array_problems, native


def held_base(params: Mapping[Any, Any], source: str, where: str) -> Checkpoint:
    """A base in memory; every name is a tensor of its own.

    Args:
      params: its weights by canonical name.
      source: what sentences about other models call it.
      where: what problems of its own tensors begin with.

    Raises:
      CheckpointError: values that are no arrays, or without a name.
    """
    return _held(params, source, where)


def held_task(params: Mapping[Any, Any], source: str, base: Checkpoint) -> Checkpoint:
    """A task in memory; of tied tensors only one is listed, unless the base lists more.

    Args:
      params: its weights by canonical name.
      source: what messages call it.
      base: from which it was fine-tuned.

    Raises:
      CheckpointError: values that are no arrays, or without a name.
    """
    task = _held(params, source, source)
    tied = tie(task.tensors, base.config, compare_bytes=True)
    tensors = {name: info for name, info in tied.items() if name in task.tensors or name in base.tensors}
    tensors |= {name: info for name, info in task.tensors.items() if name in base.tensors}
    return dataclasses.replace(task, tensors=tensors)


def _held(params: Mapping[Any, Any], source: str, where: str) -> Checkpoint:
    raise_all(CheckpointError, array_problems(params, where))
    return Checkpoint(
        source=source,
        revision=None,
        path=Path(),
        format=SAFETENSORS,
        config={},
        tensors={name: _tensor(name, native(value), where) for name, value in params.items()},
        weight_files=(),
        metadata={},
    )


def _tensor(name: str, value: AnyArray, where: str) -> HeldTensor:
    shape = tuple(value.shape)
    dtype = str(value.dtype)
    return HeldTensor(
        name=name,
        stored_name=name,
        file=Path(where),
        shape=shape,
        dtype=code_of(dtype) or dtype.upper(),
        stored_shape=shape,
        axes=tuple(range(len(shape))),
        spans=(),
        value=value,
    )
