"""Parameters of live HF Flax models to canonical names, and back."""

from collections.abc import Iterator, Mapping
from typing import Any

from nufilt_jax.checkpoints.dtypes import AnyArray
from nufilt_jax.checkpoints.names import (
    canonical_names,
    flax_axes,
    from_flax_name,
    has_flax_form,
    to_flax_name,
)
from nufilt_jax.errors import CheckpointError, Problem, raise_all
from nufilt_jax.values import array_problems


def from_flax(params: Mapping[Any, Any], config: object) -> dict[str, AnyArray]:
    """Canonical flat dict of a Flax model's parameters; kernels become `[d_out, d_in]`.

    Args:
      params: `model.params` or a module's variables: nested, or flattened with tuples or `/` as keys.
      config: the model's config, as an object with `to_dict` or as a dict.

    Raises:
      CheckpointError: the model is neither CLIP nor T5, whose Flax names are known, or values are no arrays.
    """
    _checked_config(config)
    arrays = {path.removeprefix("params/"): array for path, array in _flatten(params, ())}
    raise_all(CheckpointError, array_problems(arrays, "params"))
    canonical = canonical_names({from_flax_name(path) for path in arrays})
    return {
        canonical[from_flax_name(path)]: array.transpose(flax_axes(path, array.ndim)) for path, array in arrays.items()
    }


def to_flax(params: Mapping[str, Any], config: object) -> dict[str, Any]:
    """Nested tree for an HF Flax model: the inverse of `from_flax`.

    Raises:
      CheckpointError: the model is neither CLIP nor T5, whose Flax names are known, or values are no arrays.
    """
    settings = _checked_config(config)
    raise_all(CheckpointError, array_problems(params, "params"))
    tree: dict[str, Any] = {}
    for name, array in params.items():
        path = to_flax_name(name, array.ndim, settings)
        *modules, leaf = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        axes = flax_axes(path, array.ndim)
        node[leaf] = array.transpose(sorted(range(array.ndim), key=axes.__getitem__))
    return tree


def _checked_config(config: object) -> Mapping[str, Any]:
    to_dict = getattr(config, "to_dict", None)
    settings = to_dict() if callable(to_dict) else config
    if not isinstance(settings, Mapping) or not has_flax_form(settings):
        model_type = settings.get("model_type") if isinstance(settings, Mapping) else settings
        what = f"model_type {model_type!r} has no Flax names known here"
        raise CheckpointError(Problem("config", what, "give the config of a CLIP or T5 model"))
    return settings


def _flatten(node: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for key, child in node.items():
        here = (*path, *(key if isinstance(key, tuple) else (str(key),)))
        if isinstance(child, Mapping):
            yield from _flatten(child, here)
        else:
            yield "/".join(here), child
