import json
from importlib import resources

import jax
import numpy as np
import pytest

from nufilt_jax.evaluation import evaluate_tasks
from nufilt_jax.zoo import TASK_NAMES, evaluation_tasks, load_heads, load_params
from nufilt_jax.zoo.tiny import CONFIG
from nufilt_jax.zoo.train import Phase, initial_params, make_data, make_heads, train

WEIGHTS = resources.files("nufilt_jax.zoo") / "weights"
SELECTED = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight", "fc1.weight")


def test_training():
    phase = Phase(steps=100, batch=8, learning_rate=1e-3, weight_decay=0.0, n_images=64, other_rate=0.0)
    data = make_data(["shapes", "letters"], None, phase.n_images)
    start = initial_params(0)
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules multiply the step count by a float
        first, losses = train(start, data, phase, jax.random.key(0))
        again, _ = train(initial_params(0), data, phase, jax.random.key(0))
    assert len(losses) == 2
    assert losses[1] < losses[0]
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        moved = float(np.abs(value - start[name]).max())
        assert (moved > 1e-4) == name.endswith(SELECTED), name  # the rate of all others is zero


def test_shipped_heads_are_those_of_the_script():
    shipped = load_heads()
    for task, head in make_heads().items():
        np.testing.assert_allclose(shipped[task], head, atol=1e-6)


def test_shipped_weights_score_as_their_record_says():
    record = json.loads((WEIGHTS / "training.json").read_text())["validation"]
    tasks = evaluation_tasks(split="val")
    # One image of 500 is 0.002; another machine's rounding may move a few that are on the edge.
    assert evaluate_tasks(load_params("base"), CONFIG, tasks) == pytest.approx(record["pretrained"], abs=0.01)
    for task in tasks:
        score = evaluate_tasks(load_params(task.name), CONFIG, [task])[task.name]
        assert score == pytest.approx(record["individual"][task.name], abs=0.01)
    assert tuple(record["individual"]) == TASK_NAMES
