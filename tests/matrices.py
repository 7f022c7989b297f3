"""Matrices with a chosen spectrum."""

import functools

import numpy as np


def orthonormal(rng, rows, columns):
    q, _ = np.linalg.qr(rng.normal(size=(rows, columns)))
    return q


@functools.cache
def power_law(shape, *, seed, scale=0.02, exponent=0.6, rank=None):
    """σ_k ∝ k^-exponent, cut off behind `rank`; entries of size `scale` / sqrt(inputs)."""
    rng = np.random.default_rng(seed)
    m, n = shape
    size = min(m, n)
    s = np.arange(1, size + 1.0) ** -exponent
    s[size if rank is None else rank :] = 0
    x = orthonormal(rng, m, size) * s @ orthonormal(rng, n, size).T
    norm = np.linalg.norm(x)
    return (x * (scale * np.sqrt(m) / norm if norm else 0)).astype(np.float32)


def start(rank, width, *, seed=7):
    return (0.02 * np.random.default_rng(seed).normal(size=(rank, width))).astype(np.float32)


def relative_error(x, reference):
    return float(np.linalg.norm(np.asarray(x, np.float64) - reference) / np.linalg.norm(reference))
