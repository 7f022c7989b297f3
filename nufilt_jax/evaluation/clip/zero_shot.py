"""Zero-shot classification: cosine similarity with one frozen embedding per class."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from nufilt_jax.errors import ConfigError, Problem

# Heads are padded to this many classes: the tasks of arXiv:2509.21413v2, with 397 at most, then share a program.
_FEWEST_SLOTS = 512


def class_logits(
    features: Float[Array, "b d"], head: Float[Array, "c d"], scale: float | Float[Array, ""] = 100.0
) -> Float[Array, "b c"]:
    """`scale` times the cosine between every image and every class.

    Args:
      features: of the images; their length does not matter.
      head: class embeddings of unit length.
      scale: CLIP's logit scale; it does not move the best class.

    Returns:
      Logits. An image whose features are all zero has zero for every class.
    """
    length = jnp.linalg.norm(features, axis=1, keepdims=True)
    # Divided by 1 where the length is 0: the quotient then is 0, not NaN.
    unit = features / jnp.where(length > 0, length, 1)
    return scale * jnp.matmul(unit, head.T, precision=jax.lax.Precision.HIGHEST)


def normalise_head(embeddings: Float[np.ndarray, "c d"]) -> Float[np.ndarray, "c d"]:
    """Scales class embeddings to unit length, in float32.

    Raises:
      ConfigError: an embedding is zero or not finite.
    """
    length = np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
    if not np.all(np.isfinite(length) & (length > 0)):
        raise ConfigError(Problem("head", "a class embedding is zero or not finite"))
    return (embeddings / length).astype(np.float32)


def padded_head(head: Float[np.ndarray, "c d"]) -> tuple[Float[np.ndarray, "slots d"], Bool[np.ndarray, " slots"]]:
    """A head with room for more classes, so that tasks share a program, and which of its rows are classes."""
    slots = max(_FEWEST_SLOTS, 1 << (len(head) - 1).bit_length())
    return np.pad(head.astype(np.float32), ((0, slots - len(head)), (0, 0))), np.arange(slots) < len(head)


def orthogonal_head(n_classes: int, dim: int, *, seed: int) -> Float[np.ndarray, "c d"]:
    """Random class embeddings of unit length, orthogonal to one another.

    NumPy draws and factorises: it is the host's work, done once, and no LAPACK call reaches the device.

    Raises:
      ConfigError: there are more classes than dimensions.
    """
    if n_classes > dim:
        raise ConfigError(Problem("head", f"{n_classes} orthogonal classes do not fit into {dim} dimensions"))
    gaussian = np.random.default_rng(seed).standard_normal((dim, n_classes))
    # In C order: safetensors writes the memory as it lies, and the transpose would be read back wrong.
    return np.ascontiguousarray(np.linalg.qr(gaussian)[0].T, dtype=np.float32)
