"""WUDI, Iso-C, TSV-M and OPCM once more: float64 NumPy, loops and slices, no code shared with the package."""

import numpy as np


def wudi_loss(m, d, t):
    return sum(np.sum(((m - x) @ x.T) ** 2) / np.sum(x**2) for x in (d, t) if x.any())


def wudi(d, t, *, steps, learning_rate):
    """M and its losses, from the definition: each operand's term by itself, nothing precomputed."""
    d, t = np.float64(d), np.float64(t)
    m, first, second = d + t, np.zeros(d.shape), np.zeros(d.shape)
    losses = [wudi_loss(m, d, t)]
    for step in range(1, steps + 1):
        gradient = np.zeros(d.shape)
        for x in (d, t):
            if x.any():
                gradient += 2 * ((m - x) @ x.T) @ x / np.sum(x**2)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        m = m - learning_rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        losses.append(wudi_loss(m, d, t))
    return m, np.array(losses)


def rank(s, shape):
    """How many singular values are no rounding of float32."""
    return sum(x > s[0] * max(shape) * np.finfo(np.float32).eps for x in s)


def svd(x):
    """U, σ and V of the directions that the matrix has."""
    u, s, vt = np.linalg.svd(np.float64(x), full_matrices=False)
    r = rank(s, x.shape)
    return u[:, :r], s[:r], vt[:r].T


def polar(x):
    u, _, v = svd(x)
    return u @ v.T


def iso_c(d, t):
    c = np.float64(d) + np.float64(t)
    s = np.linalg.svd(c, compute_uv=False)
    return sum(s) / len(s) * polar(c)


def tsv_m(d, t):
    kept = []
    for x in (d, t):
        u, s, v = svd(x)
        k = min(min(x.shape) // 2, len(s))
        kept += [(u[:, i], s[i], v[:, i]) for i in range(k)]
    if not kept:
        return np.zeros(d.shape)
    left, right = polar(np.stack([u for u, _, _ in kept], 1)), polar(np.stack([v for _, _, v in kept], 1))
    return sum(s * np.outer(left[:, i], right[:, i]) for i, (_, s, _) in enumerate(kept))


def opcm_block(d, alpha):
    """U_ρ and V_ρ, and the pairs that stand after them."""
    u, s, v = svd(d)
    rho = 0
    while rho < len(s) and sum(s[: rho + 1]) / sum(s) <= alpha:
        rho += 1
    return u[:, :rho], v[:, :rho], list(zip(u[:, rho:].T, v[:, rho:].T, strict=True))


def opcm_projected(d, t, alpha, mask_diagonal):
    t = np.float64(t)
    u, v, rest = opcm_block(d, alpha)
    result = t - u @ u.T @ t @ v @ v.T
    for left, right in rest if mask_diagonal else []:
        result = result - (left @ t @ right) * np.outer(left, right)
    return result


def model_norm(model, copies=None):
    return np.sqrt(sum((copies or {}).get(name, 1) * np.sum(np.float64(x) ** 2) for name, x in model.items()))


def opcm(tasks, *, linear, alpha=0.5, mask_diagonal=False, skipped=(), copies=None):
    """D and λ after every task."""
    steps, d, scale = [], {}, 1.0
    for t, task in enumerate(tasks, 1):
        if t == 1:
            d = {name: np.float64(x) for name, x in task.items()}
        else:
            for name, x in task.items():
                new = opcm_projected(d[name], x, alpha, mask_diagonal) if name in linear else x
                if name not in skipped:
                    d[name] = scale * d[name] + new
            mean = sum(model_norm(seen, copies) for seen in tasks[:t]) / t
            scale = model_norm(d, copies) / mean
            d = {name: x / scale for name, x in d.items()}
        steps.append((dict(d), scale))
    return steps
