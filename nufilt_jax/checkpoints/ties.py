"""Tied tensors: several stored names of one parameter, listed once."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nufilt_jax.checkpoints.names import alias_groups
from nufilt_jax.checkpoints.tensors import TensorInfo, stream_bytes


def tie(infos: Mapping[str, TensorInfo], config: Mapping[str, Any], *, compare_bytes: bool) -> dict[str, TensorInfo]:
    """Lists each tied tensor once, under its group's first name, and remembers the other copies.

    Args:
      infos: every stored tensor by canonical name.
      config: says whether an output head is tied to the embedding.
      compare_bytes: tie only copies that are equal in the file, whatever the config says.
    """
    tied = dict(infos)
    for group in alias_groups(infos, config):
        members = [infos[name] for name in group if name in infos]
        first, *others = members
        same = [other for other in others if is_copy(first, other, compare_bytes=compare_bytes)]
        for copy in (first, *same):
            del tied[copy.name]
        tied[group[0]] = dataclasses.replace(first, name=group[0], aliases=tuple(same))
    return tied


def is_copy(one: TensorInfo, other: TensorInfo, *, compare_bytes: bool) -> bool:
    """Whether two stored tensors are the same parameter: of one form and, if asked, equal in every byte."""
    if (one.shape, one.dtype, one.axes) != (other.shape, other.dtype, other.axes):
        return False
    if not compare_bytes:
        return True
    pairs = zip(stream_bytes(one), stream_bytes(other), strict=True)
    return all(a == b for a, b in pairs)
