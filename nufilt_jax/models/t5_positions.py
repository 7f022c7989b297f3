"""T5's relative positions: which bucket, and so which row of the table, a distance belongs to."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def relative_buckets(
    relative: Int[Array, "q k"], *, bidirectional: bool, n_buckets: int, max_distance: int
) -> Int[Array, "q k"]:
    """Row of the table of relative positions for each pair of a query and a key.

    Source: Raffel et al., arXiv:1910.10683v4, section 2.1, with the bucket bounds of Mesh TensorFlow's T5.

    Args:
      relative: position of the key minus position of the query.
      bidirectional: keys after the query have the upper half of the buckets. Otherwise they share bucket 0.
      n_buckets: rows of the table.
      max_distance: distances from here on share the last bucket.
    """
    before = 0
    if bidirectional:
        n_buckets //= 2
        before = jnp.where(relative > 0, n_buckets, 0)
        distance = jnp.abs(relative)
    else:
        distance = jnp.maximum(-relative, 0)
    rows = jnp.asarray(_distance_buckets(n_buckets, max_distance))
    return before + rows[jnp.minimum(distance, max_distance)]


def _distance_buckets(n_buckets: int, max_distance: int) -> Int[np.ndarray, " distances"]:
    """Bucket of the distances 0, 1, ... `max_distance`: one each up to half of the buckets, then geometric steps.

    In integers, not with logarithms in float32 as elsewhere: a distance at a bound (16, 32, 64 for 32 buckets up to
    128) must not depend on how a device rounds.
    """
    n_single = n_buckets // 2
    n_wide = n_buckets - n_single

    def bucket(distance: int) -> int:
        if distance < n_single:
            return distance
        # the k-th bound is n_single (max_distance / n_single)^(k / n_wide), here with both sides to the power n_wide
        reached = (distance**n_wide * n_single**k >= max_distance**k * n_single**n_wide for k in range(1, n_wide))
        return n_single + sum(reached)

    return np.array([bucket(distance) for distance in range(max_distance + 1)], np.int32)
