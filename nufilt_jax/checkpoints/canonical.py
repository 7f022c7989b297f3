"""Live parameters by canonical name, whichever library they come from."""

from collections.abc import Mapping
from typing import Any

from nufilt_jax.checkpoints.dtypes import AnyArray
from nufilt_jax.checkpoints.flax_trees import from_flax
from nufilt_jax.checkpoints.names import canonical_names
from nufilt_jax.checkpoints.orientation import stored_axes, with_conv1d
from nufilt_jax.errors import CheckpointError, Problem, raise_all
from nufilt_jax.values import array_problem


def canonical(params: Mapping[Any, Any], config: object = None) -> dict[str, AnyArray]:
    """Parameters as `nufilt_jax.load` would give them: canonical names, linear weights `[d_out, d_in]`.

    Args:
      params: a torch model's `state_dict()` as numpy arrays, in the names of transformers 4 or 5; or what `from_flax`
        takes, nested.
      config: the model's config, as an object with `to_dict` or as a dict; needed where weights may lie
        `[d_in, d_out]`, as GPT-2's, and for Flax models.

    Raises:
      CheckpointError: two names with one meaning, or values that are no arrays.

    >>> import numpy as np
    >>> weights = {"h.0.attn.c_attn.weight": np.zeros((8, 24), np.float32)}
    >>> canonical(weights, {"model_type": "gpt2"})["h.0.attn.c_attn.weight"].shape
    (24, 8)
    """
    is_flat = all(isinstance(name, str) and "/" not in name for name in params)
    if any(isinstance(value, Mapping) for value in params.values()) or not is_flat:
        return from_flax(params, config)
    to_dict = getattr(config, "to_dict", None)
    settings = to_dict() if callable(to_dict) else config
    if settings is not None and not isinstance(settings, Mapping):
        raise CheckpointError(Problem("config", f"must be a model's config or a dict, got {type(settings).__name__}"))
    shapes = {stored: tuple(array.shape) for stored, array in params.items() if hasattr(array, "shape")}
    settings = with_conv1d(settings or {}, shapes)
    names, found, problems = canonical_names(set(params)), dict[str, AnyArray](), list[Problem]()
    for stored, array in params.items():
        name = names[stored]
        if fault := array_problem(array, "params", stored):
            problems.append(fault)
        elif name in found:
            problems.append(Problem("params", f"means the same tensor as another: {name}", "keep one of them", stored))
        else:
            found[name] = array.transpose(stored_axes(name, tuple(array.shape), settings))
    raise_all(CheckpointError, problems)
    return found
