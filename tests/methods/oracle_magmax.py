"""MagMax once more, entry by entry: float64 NumPy, no code shared with the package."""

import numpy as np


def largest(vectors):
    """Of each entry the value of largest magnitude; of equal magnitudes the last."""
    result = np.zeros(vectors[0].size)
    for index in range(result.size):
        for vector in vectors:
            value = float(vector.ravel()[index])
            if abs(value) >= abs(result[index]):
                result[index] = value
    return result.reshape(vectors[0].shape)


def merge(vectors, scale, variant):
    """D after all of the task vectors of one tensor."""
    if variant == "code":
        return scale * largest(vectors)
    return scale * sum(largest(vectors[: t + 1]) for t in range(len(vectors)))
