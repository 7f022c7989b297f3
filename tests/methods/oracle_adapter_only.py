"""Row 3 of Table 4 once more: float64 NumPy, its two losses as they stand, and their gradients by differences."""

import numpy as np
import oracle


def loss(variant, d, tau, b, a, v1, v2):
    """The objective with I + BA (code) or BA (text) as the right factor."""
    adapted = tau @ b @ a
    if variant == "code":
        return np.sum(((d + adapted) @ v1) ** 2) + np.sum(((tau + adapted) @ v2) ** 2)
    return np.sum(((tau - d - adapted) @ v1) ** 2) + np.sum((adapted @ v2) ** 2)


def derivative(function, x):
    """Of a quadratic in each entry of x: central differences are exact."""
    found = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1
        found[index] = (function(x + step) - function(x - step)) / 2
    return found


def update(variant, d, tau, start, *, filter_rank, task_rank, steps, learning_rate=1e-3):
    """τ (I + BA) or τ B A of one layer after Adam on (A, B), and the losses on the way."""
    d, tau, a = (np.asarray(x, np.float64) for x in (d, tau, start))
    b = np.zeros(a.T.shape)
    v2, v1 = oracle.leading(d, filter_rank), oracle.leading(tau, task_rank)
    moments_a, moments_b = (np.zeros_like(a),) * 2, (np.zeros_like(b),) * 2
    losses = [loss(variant, d, tau, b, a, v1, v2)]
    for step in range(1, steps + 1):
        grad_a = derivative(lambda x, b=b: loss(variant, d, tau, b, x, v1, v2), a)
        grad_b = derivative(lambda x, a=a: loss(variant, d, tau, x, a, v1, v2), b)
        a, moments_a = oracle.adam(a, grad_a, moments_a, step, learning_rate)
        b, moments_b = oracle.adam(b, grad_b, moments_b, step, learning_rate)
        losses.append(loss(variant, d, tau, b, a, v1, v2))
    return (tau if variant == "code" else 0) + tau @ b @ a, np.array(losses)
