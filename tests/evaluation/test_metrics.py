import numpy as np
import pytest

from nufilt_jax.errors import ConfigError
from nufilt_jax.evaluation import accuracy_matrix, average_accuracy, backward_transfer

SCORES = [
    {"a": 0.9, "b": 0.2},
    {"a": 0.7, "b": 0.8},
    {"a": 0.6, "b": 0.85, "c": 0.5},
]


def test_accuracy_matrix():
    matrix = accuracy_matrix(SCORES, ["a", "b", "c"])
    np.testing.assert_array_equal(matrix, [[0.9, 0.7, 0.6], [0.2, 0.8, 0.85], [np.nan, np.nan, 0.5]])


def test_scores_by_hand():
    matrix = accuracy_matrix(SCORES, ["a", "b", "c"])
    assert average_accuracy(matrix) == pytest.approx((0.6 + 0.85 + 0.5) / 3)
    # a: 0.6 - 0.9, b: 0.85 - 0.8; c came last and does not count
    assert backward_transfer(matrix) == pytest.approx((-0.3 + 0.05) / 2)


def test_one_task_forgets_nothing():
    assert backward_transfer(np.array([[0.4]])) == 0.0
    assert average_accuracy(np.array([[0.4]])) == 0.4


def test_what_was_not_measured_is_refused():
    matrix = accuracy_matrix([{"a": 0.9}, {"b": 0.8}], ["a", "b"])
    for metric in (average_accuracy, backward_transfer):
        with pytest.raises(ConfigError, match="an accuracy that this metric needs was not measured"):
            metric(matrix)


def test_scores_and_tasks_must_fit():
    with pytest.raises(ConfigError, match="1 steps were scored, 2 tasks"):
        accuracy_matrix([{"a": 0.9}], ["a", "b"])
    with pytest.raises(ConfigError, match="of tasks that were not merged: z"):
        accuracy_matrix([{"z": 0.9}], ["a"])
    with pytest.raises(ConfigError, match="there are none"):
        average_accuracy(accuracy_matrix([], []))
