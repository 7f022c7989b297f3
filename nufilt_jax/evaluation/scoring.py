"""Batches of images through a zero-shot classifier: one compiled program for all models and tasks of one shape."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from nufilt_jax.config import ComputeType
from nufilt_jax.errors import ConfigError, Problem
from nufilt_jax.evaluation.clip.zero_shot import class_logits, padded_head
from nufilt_jax.models.clip import vision_features
from nufilt_jax.models.clip_config import ClipVisionConfig, parse_vision_config
from nufilt_jax.models.clip_names import to_flax_tree
from nufilt_jax.models.experts import has_experts

Pixels = Float[np.ndarray, "b 3 h w"] | UInt8[np.ndarray, "b 3 h w"]

_BATCH = 256
_CACHED = 6e6  # bytes of a layer's input: on a CPU, batches are so small that it stays in the caches
_MIXED_BATCH = 128  # of models with experts, whose answers depend on it (the baselines' evaluation settings)


class Classifier:
    """A model on this host's devices; batches are split over them.

    Attributes:
      batch_size: images per call of the compiled program; for models with experts, an image's answer is that of its
        batch, and they want all batches of this size but the last.
    """

    def __init__(
        self,
        params: Mapping[str, ArrayLike],
        config: Mapping[str, Any],
        *,
        batch_size: int | None = None,
        dtype: ComputeType = "float32",
    ) -> None:
        """Puts the model on the devices.

        Args:
          params: flat dict under canonical names, as `clip_image_features` takes it.
          config: the model's `config.json`.
          batch_size: None for 256, on a CPU for fewer where they compute faster, and for 128 with experts; rounded up
            to a multiple of the devices, but for the latter.
          dtype: in which the forward pass computes; layer norms and softmax stay in float32.

        Raises:
          CheckpointError: parameters and config do not fit; see `clip_image_features`.
          ConfigError: the batch is empty.
        """
        if batch_size is not None and batch_size < 1:
            raise ConfigError(Problem("batch_size", f"must be at least 1, got {batch_size}"))
        self._is_mixed, self._dtype, self._config = has_experts(params), dtype, parse_vision_config(config)
        if batch_size is None:
            batch_size = _MIXED_BATCH if self._is_mixed else _fast_batch(self._config)
        mesh = Mesh(np.array(jax.local_devices()), ("images",))
        self._whole, self._split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("images",)))
        self.batch_size = batch_size if self._is_mixed else -(-batch_size // mesh.size) * mesh.size
        tree = to_flax_tree(params, self._config, whole_model=config.get("model_type") == "clip")
        projection = tree.get("visual_projection")
        self._dim = self._config.hidden_size if projection is None else projection["kernel"].shape[1]
        self._tree = jax.device_put(tree, self._whole)

    def hits(
        self,
        batches: Iterable[tuple[Pixels, Int[np.ndarray, " b"]]],
        head: Float[np.ndarray, "c d"],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        *,
        where: str,
    ) -> Iterable[int]:
        """How many images of each batch have the right class; while one is awaited, the next is under way.

        Args:
          batches: images and labels, at most `batch_size` of them.
          head: class embeddings of unit length.
          mean: see `Task`.
          std: see `Task`.
          where: what problems are said of, such as "task dtd".

        Raises:
          ConfigError: the head does not fit the model's features.
        """
        if head.shape[1] != self._dim:
            what = f"class embeddings have {head.shape[1]} dimensions, the model's features {self._dim}"
            raise ConfigError(Problem(where, what))
        same = jax.device_put((*padded_head(head), np.array(mean, np.float32), np.array(std, np.float32)), self._whole)
        before: Int[Array, ""] | None = None
        for images, labels in batches:
            images, labels, sharding = self._arranged(images, labels.astype(np.int32))
            count = _count_hits(
                self._tree, *jax.device_put((images, labels), sharding), *same, config=self._config, dtype=self._dtype
            )
            if before is not None:
                yield int(before)
            before = count
        if before is not None:
            yield int(before)

    def _arranged(self, images: Pixels, labels: Int[np.ndarray, " b"]) -> tuple[np.ndarray, np.ndarray, NamedSharding]:
        """A last batch is filled with images that count for nothing; a mixture must not see such."""
        missing = self.batch_size - len(labels)
        if missing and not self._is_mixed:
            images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
            labels = np.pad(labels, (0, missing), constant_values=-1)
        return images, labels, self._whole if len(labels) % self._split.mesh.size else self._split


def _fast_batch(config: ClipVisionConfig) -> int:
    if jax.default_backend() != "cpu":
        return _BATCH
    n_images = max(1, int(_CACHED / (4 * config.num_positions * config.hidden_size)))
    return min(_BATCH, 1 << (n_images.bit_length() - 1))


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _count_hits(
    tree: Mapping[str, Any],
    images: Float[Array, "b 3 h w"] | UInt8[Array, "b 3 h w"],
    labels: Int[Array, " b"],
    head: Float[Array, "c d"],
    is_class: Bool[Array, " c"],
    mean: Float[Array, "3"],
    std: Float[Array, "3"],
    *,
    config: ClipVisionConfig,
    dtype: ComputeType,
) -> Int[Array, ""]:
    """How many images have the right class; a label of -1 is never right."""
    logits = class_logits(vision_features(tree, normalised(images, mean, std), config, dtype=dtype), head)
    best = jnp.argmax(jnp.where(is_class[None], logits, -jnp.inf), axis=1)
    return jnp.sum(best == labels)


def normalised(
    images: Float[Array, "b c h w"] | UInt8[Array, "b c h w"], mean: Float[Array, " c"], std: Float[Array, " c"]
) -> Float[Array, "b c h w"]:
    """Pixels as a model takes them: of bytes (x / 255 - mean) / std; numbers are that already."""
    pixels = images.astype(jnp.float32)
    if images.dtype != jnp.uint8:
        return pixels
    return (pixels / 255 - mean[None, :, None, None]) / std[None, :, None, None]
