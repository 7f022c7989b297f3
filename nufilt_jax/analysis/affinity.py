"""Subspace affinity: how much of what a task's data look like lies in what a task vector acts on.

On the host and in float64, by LAPACK through SciPy: there are few matrices, and no call of XLA's is in flight.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg
from jax.typing import ArrayLike
from jaxtyping import Float

_EPS = float(np.finfo(np.float32).eps)  # of the weights and moments given
PERCENTILE = 90


class Affinities(NamedTuple):
    """Affinities of every task's data with every task's vector, summed up over layers.

    Attributes:
      mean: [data of task i, vector of task j].
      high: their 90th percentile.
    """

    mean: Float[np.ndarray, "tasks tasks"]
    high: Float[np.ndarray, "tasks tasks"]


def default_rank(width: int) -> int:
    """As many directions of `width` inputs as the paper's 128 are of ViT-B's 768, at least one."""
    return max(1, width // 6)


def data_directions(second: Float[np.ndarray, "n n"], rank: int) -> Float[np.ndarray, "n k"]:
    """V_d: the directions in which a layer's inputs are largest, the leading eigenvectors of XᵀX.

    Args:
      second: XᵀX, not centred.
      rank: how many; fewer come out where the inputs have fewer, none if they are all zero.
    """
    values, vectors = _leading(second.astype(np.float64), rank)
    return vectors[:, values > len(second) * _EPS * values[0]].astype(np.float32)


def all_data_directions(second: Mapping[str, ArrayLike]) -> dict[str, Float[np.ndarray, "_ _"]]:
    """V_d of every layer, `default_rank` directions of each; layers that share their moments share the result.

    Args:
      second: XᵀX by layer, as `evaluation.layer_input_moments` gives it.
    """
    found: dict[int, np.ndarray] = {}
    for x in second.values():
        if id(x) not in found:
            found[id(x)] = data_directions(np.asarray(x), default_rank(np.shape(x)[0]))
    return {name: found[id(x)] for name, x in second.items()}


def vector_directions(vector: Float[np.ndarray, "m n"], rank: int) -> Float[np.ndarray, "n k"]:
    """V̂: the input directions that a task vector acts on most, its leading right singular vectors.

    Args:
      vector: τ of one layer.
      rank: how many; fewer come out where τ has fewer (σ_k up to max(m, n) eps σ_1 does not count), none if it is 0.
    """
    exact = vector.astype(np.float64)  # its Gram matrix squares the spectrum
    _, vectors = _leading(exact.T @ exact, rank)
    sizes = np.linalg.norm(exact @ vectors, axis=0)  # measured: roots of the smallest eigenvalues are rounding
    return vectors[:, sizes > max(vector.shape) * _EPS * sizes.max()].astype(np.float32)


def _leading(x: Float[np.ndarray, "n n"], rank: int) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "n k"]]:
    """The largest eigenvalues of a symmetric matrix, in falling order, and their vectors."""
    n = len(x)
    values, vectors = scipy.linalg.eigh(x, subset_by_index=(n - min(rank, n), n - 1))
    return values[::-1], vectors[:, ::-1]


def affinity(data: Float[np.ndarray, "n k"], vector: Float[np.ndarray, "n r"]) -> float:
    """𝒜(V_d, V̂) = ‖V̂ᵀ V_d‖²_F / r_d: the share of V_d's directions that lies in the span of V̂.

    Source: Qiu et al., arXiv:2509.21413v2, Eq. (5).

    Args:
      data: V_d, orthonormal columns.
      vector: V̂, likewise.

    Returns:
      A number from 0 to 1; NaN if the data have no direction. Random subspaces have `random_level`.

    >>> axes = np.eye(3, dtype=np.float32)
    >>> affinity(axes[:, :2], axes[:, 1:2])
    0.5
    """
    if data.shape[1] == 0:
        return float("nan")
    return float(np.sum((vector.T @ data).astype(np.float64) ** 2) / data.shape[1])


def affinity_rows(
    data: Mapping[str, Float[np.ndarray, "_ _"]],
    vectors: Sequence[Mapping[str, Float[np.ndarray, "_ _"]]],
    layers: Sequence[str],
) -> Float[np.ndarray, "tasks layers"]:
    """Affinity of one task's data with every task's vector, layer by layer.

    A task at a time, so that the directions of one task's data need not wait for another's.

    Args:
      data: V_d by layer.
      vectors: V̂ by layer, of each task.
      layers: which, in this order.
    """
    return np.array([[affinity(data[name], vector[name]) for name in layers] for vector in vectors])


def summarise(values: Float[np.ndarray, "tasks tasks layers"]) -> Affinities:
    """Mean and 90th percentile over layers; layers without data directions are left out."""
    return Affinities(np.nanmean(values, axis=2), np.nanpercentile(values, PERCENTILE, axis=2))


def own_and_cross(
    values: Float[np.ndarray, "tasks tasks layers"],
) -> tuple[Float[np.ndarray, " own"], Float[np.ndarray, " cross"]]:
    """The affinities of tasks with their own vector, of all layers, and those with another task's."""
    own = np.eye(len(values), dtype=bool)
    pairs = values[own].ravel(), values[~own].ravel()
    return pairs[0][~np.isnan(pairs[0])], pairs[1][~np.isnan(pairs[1])]


def random_level(ranks: Sequence[int], widths: Sequence[int]) -> float:
    """The affinity that random subspaces would have, r/n, mean over layers.

    >>> random_level([128], [768]) == 1 / 6
    True
    """
    return float(np.mean(np.array(ranks) / np.array(widths)))
