"""Test-time adaptation once more: float64 NumPy, loops, gradients by hand or by central differences."""

import numpy as np

EPS = 1e-8


def entropy_of(z):
    """Entropy of one row of logits, and its gradient."""
    p = np.exp(z - z.max())
    p /= p.sum()
    value = -sum(q * np.log(q + EPS) for q in p)
    slope = np.array([-np.log(q + EPS) - q / (q + EPS) for q in p])
    return value, p * (slope - sum(p * slope))


def entropy(logits, kind):
    """Loss of a batch, and its gradient in the logits."""
    n = len(logits)
    if kind == "of_mean":
        value, slope = entropy_of(logits.mean(axis=0))
        return value, np.stack([slope / n] * n)
    rows = [entropy_of(row) for row in logits]
    return sum(value for value, _ in rows) / n, np.stack([slope / n for _, slope in rows])


def logits(params, x):
    """The model of the tests: a scaled input times a matrix, and a bias."""
    return (x * params["gain"]) @ params["head.weight"].T + params["head.bias"]


def gradients(params, x, slope):
    """By parameter, from the loss's gradient in the logits."""
    return {
        "head.weight": slope.T @ (x * params["gain"]),
        "head.bias": slope.sum(axis=0),
        "gain": (x * (slope @ params["head.weight"])).sum(axis=0),
    }


def adam_step(values, slopes, moments, step, learning_rate):
    """One step for a dict of arrays; `moments` is changed."""
    new = {}
    for name, slope in slopes.items():
        first, second = moments.get(name, (0.0, 0.0))
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        moments[name] = first, second
        direction = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + EPS)
        new[name] = values[name] - learning_rate * direction
    return new


def adamerging(base, delta, task, batches, *, init, learning_rate, kind, accumulate):
    """D after one task, and the loss before each step."""
    tau = {name: task[name] - base[name] for name in base}
    start = {name: base[name] + (delta[name] if accumulate else 0.0) for name in base}
    c = {name: np.float64(init) for name in base}
    moments, losses = {}, []
    for step, x in enumerate(batches, 1):
        params = {name: start[name] + min(max(c[name], 0.0), 1.0) * tau[name] for name in base}
        loss, slope = entropy(logits(params, x), kind)
        losses.append(loss)
        inner = gradients(params, x, slope)
        slopes = {name: np.sum(inner[name] * tau[name]) * (0 < c[name] < 1) for name in base}
        c = adam_step(c, slopes, moments, step, learning_rate)
    return {name: start[name] - base[name] + min(max(c[name], 0.0), 1.0) * tau[name] for name in base}, losses


def numeric_gradients(loss, variables, h=1e-5):
    """Central differences of `loss(variables)` in every number."""
    slopes = {}
    for name, value in variables.items():
        slope = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            sides = []
            for sign in (1, -1):
                moved = value.copy()
                moved[index] += sign * h
                sides.append(loss({**variables, name: moved}))
            slope[index] = (sides[0] - sides[1]) / (2 * h)
        slopes[name] = slope
    return slopes


def trained(loss, variables, batches, learning_rate):
    """Adam on `loss(variables, batch)`: the variables, and the loss before each step."""
    moments, losses = {}, []
    for step, batch in enumerate(batches, 1):
        losses.append(loss(variables, batch))
        slopes = numeric_gradients(lambda v, batch=batch: loss(v, batch), variables)
        variables = adam_step(variables, slopes, moments, step, learning_rate)
    return variables, losses
