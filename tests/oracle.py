"""Every equation of the method once more: float64 NumPy, loops and slices, no code shared with the package."""

import numpy as np

EPS = np.finfo(np.float32).eps  # the rank mask is float32's, whatever the oracle computes in


def leading(x, rank):
    """Right singular vectors that count: sliced, where the package masks."""
    _, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    kept = [k for k in range(min(rank, len(s))) if s[k] > s[0] * max(x.shape) * EPS]
    return vt[kept].T


def projector(x, rank):
    v = leading(x, rank)
    return np.eye(x.shape[1]) - v @ v.T


def residuals(d, tau, p, b, a, v1, v2):
    """The two blocks of Eq. (16): what the new task loses, and what the earlier ones feel."""
    plasticity = (tau - d) @ v1 - tau @ (p @ v1 + b @ (a @ v1))
    stability = tau @ (p @ v2 + b @ (a @ v2))
    return plasticity, stability


def loss(d, tau, p, b, a, v1, v2):
    plasticity, stability = residuals(d, tau, p, b, a, v1, v2)
    return np.sum(plasticity**2) + np.sum(stability**2)


def gradients(d, tau, p, b, a, v1, v2):
    plasticity, stability = residuals(d, tau, p, b, a, v1, v2)
    pull_1, pull_2 = -2 * tau.T @ plasticity, 2 * tau.T @ stability
    return (b.T @ pull_1) @ v1.T + (b.T @ pull_2) @ v2.T, pull_1 @ (a @ v1).T + pull_2 @ (a @ v2).T


def adam(x, gradient, moments, step, learning_rate):
    first = 0.9 * moments[0] + 0.1 * gradient
    second = 0.999 * moments[1] + 0.001 * gradient**2
    direction = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return x - learning_rate * direction, (first, second)


def nufilt_update(d, tau, start, *, filter_rank, task_rank, steps=50, learning_rate=1e-3, p=None):
    """Δ = τ(P + BA) of one layer after Adam on (A, B), and the losses on the way; any other matrix for P if given."""
    d, tau, a = (np.asarray(x, np.float64) for x in (d, tau, start))
    b = np.zeros(a.T.shape)
    v2, v1 = leading(d, filter_rank), leading(tau, task_rank)
    p = projector(d, filter_rank) if p is None else p
    moments_a, moments_b = (np.zeros_like(a),) * 2, (np.zeros_like(b),) * 2
    losses = [loss(d, tau, p, b, a, v1, v2)]
    for step in range(1, steps + 1):
        grad_a, grad_b = gradients(d, tau, p, b, a, v1, v2)
        a, moments_a = adam(a, grad_a, moments_a, step, learning_rate)
        b, moments_b = adam(b, grad_b, moments_b, step, learning_rate)
        losses.append(loss(d, tau, p, b, a, v1, v2))
    return tau @ (p + b @ a), np.array(losses)
