"""What the linear layers of a CLIP vision tower are given: second moments of their inputs on a task's images."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt8

from nufilt_jax.errors import ConfigError, Problem
from nufilt_jax.evaluation.scoring import normalised
from nufilt_jax.models import ClipVisionConfig, canonical_shapes, parse_vision_config, to_flax_tree, vision_features
from nufilt_jax.models.experts import has_experts

_BLOCKS = "vision_model.encoder.layers."
_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj"}  # one product serves all three


class InputMoments(NamedTuple):
    """Second moments of the inputs of linear layers.

    Attributes:
      second: XᵀX by canonical weight name, X being all tokens of all images one below the other; not centred.
      tokens: number of rows of X, the same for every layer.
    """

    second: dict[str, Float[Array, "_ _"]]
    tokens: int


def tower_layers(config: Mapping[str, Any]) -> dict[str, int]:
    """The weights of all linear layers in the blocks of a vision tower, with their number of inputs.

    Args:
      config: the model's `config.json`.

    Raises:
      CheckpointError: it is not of a CLIP model.
    """
    shapes = canonical_shapes(parse_vision_config(config))
    return {name: shape[1] for name, shape in shapes.items() if name.startswith(_BLOCKS) and len(shape) == 2}


def layer_input_moments(
    params: Mapping[str, ArrayLike],
    config: Mapping[str, Any],
    images: Float[np.ndarray, "images c h w"] | UInt8[np.ndarray, "images c h w"],
    *,
    mean: tuple[float, ...] = (0.0, 0.0, 0.0),
    std: tuple[float, ...] = (1.0, 1.0, 1.0),
    batch_size: int = 64,
) -> InputMoments:
    """Second moments of what q, k, v, out_proj, fc1 and fc2 of every block are given: one pass over the images.

    Args:
      params: flat dict under canonical names, as `clip_image_features` takes it.
      config: the model's `config.json`.
      images: normalised float32, or uint8 as in files, normalised on the device.
      mean: per channel, subtracted from uint8 images after these were divided by 255.
      std: per channel, divides uint8 images after that.
      batch_size: images per call of the compiled program; the result depends on it by rounding alone.

    Returns:
      The moments on the device, in float32; q, k and v share one array.

    Raises:
      CheckpointError: parameters and config do not fit; see `clip_image_features`.
      ConfigError: there are no images, or the model has experts, whose layers have no input of their own.
    """
    if len(images) == 0:
        raise ConfigError(Problem("images", "there are none"))
    if has_experts(params):
        raise ConfigError(Problem("params", "layers of experts have no input of their own", "take a model without"))
    vision = parse_vision_config(config)
    tree = to_flax_tree(params, vision, whole_model=config.get("model_type") == "clip")
    layers = tower_layers(config)
    total = {name: jnp.zeros((n, n), jnp.float32) for name, n in layers.items() if _input_of(name) == name}
    scaling = np.array(mean, np.float32), np.array(std, np.float32)
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        weights = np.arange(batch_size) < len(batch)  # the last batch is filled with images that count for nothing
        batch = np.pad(batch, [(0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)])
        total = _add_batch(total, tree, batch, weights.astype(np.float32), *scaling, config=vision)
    return InputMoments({name: total[_input_of(name)] for name in layers}, len(images) * vision.num_positions)


@functools.partial(jax.jit, static_argnames="config", donate_argnums=0)
def _add_batch(
    total: dict[str, Float[Array, "_ _"]],
    tree: Mapping[str, Any],
    images: Float[Array, "b c h w"] | UInt8[Array, "b c h w"],
    weights: Float[Array, " b"],
    mean: Float[Array, " c"],
    std: Float[Array, " c"],
    *,
    config: ClipVisionConfig,
) -> dict[str, Float[Array, "_ _"]]:
    """`total`, and the moments of one batch, whose images count `weights` times."""
    inputs: dict[str, Float[Array, "b tokens _"]] = {}
    with nn.intercept_methods(_recorder(inputs)):
        vision_features(tree, normalised(images, mean, std), config)

    def product(name: str) -> Float[Array, "n n"]:
        x = inputs[name].astype(jnp.float32)
        counted = x * weights[:, None, None]
        return jnp.einsum("bti,btj->ij", counted, x, precision=jax.lax.Precision.HIGHEST)

    return {name: sum_ + product(name) for name, sum_ in total.items()}


def _recorder(inputs: dict[str, Any]) -> Callable[..., Any]:
    """Notes the input of every dense layer under its weight's canonical name, and leaves the computation as it is."""

    def record(call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, nn.Dense):
            inputs[".".join((*context.module.path, "weight"))] = args[0]
        return call(*args, **kwargs)

    return record


def _input_of(name: str) -> str:
    """The layer under whose name a layer's input is kept."""
    stem, layer, leaf = name.rsplit(".", 2)
    return f"{stem}.{_SAME_INPUT.get(layer, layer)}.{leaf}"
