"""TIES-Merging once more, entry by entry of one vector: float64 NumPy, no code shared with the package."""

import numpy as np


def trim(x, density):
    """Keeps the magnitudes from the q-th smallest on, q = d − ⌊p d⌋."""
    density = density / 100 if density > 1 else density
    q = len(x) - int(np.floor(len(x) * density))
    if q == 0:
        return np.array(x, np.float64)
    threshold = sorted(abs(v) for v in x)[q - 1]
    return np.array([v if abs(v) >= threshold else 0.0 for v in x], np.float64)


def kernel(x, y, density):
    """TIES_p(x, y): trim, elect, sum what agrees."""
    x, y = trim(x, density), trim(y, density)
    signs = [np.sign(a + b) for a, b in zip(x, y, strict=True)]
    majority = np.sign(sum(signs))
    result = []
    for a, b, sign in zip(x, y, signs, strict=True):
        sign = majority if sign == 0 else sign
        result.append(sum(v for v in (a, b) if (v > 0 if sign > 0 else v < 0)))
    return np.array(result)


def model_kernel(x, y, density, copies):
    """The kernel of two models, {name: tensor}: one vector in which `shared.weight` stands several times."""
    order = [name for name in x for _ in range(copies if name == "shared.weight" else 1)]
    flat = [np.concatenate([np.asarray(part[name], np.float64).ravel() for name in order]) for part in (x, y)]
    z, result, start = kernel(*flat, density), {}, 0
    for name in order:
        result[name] = z[start : start + x[name].size].reshape(x[name].shape)
        start += x[name].size
    return result


def add(delta, z, scale, copies):
    """D + λ Z, the embedding once for each of its names."""
    times = {name: copies if name == "shared.weight" else 1 for name in delta}
    return {name: np.float64(1) * delta[name] + times[name] * scale * z[name] for name in delta}
