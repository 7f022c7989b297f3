"""Two tensors held against each other."""

import numpy as np

from nufilt_jax.engine import sameness


def judged(old, new, tolerance):
    found = sameness.Comparison()
    sameness._judge(found, "file", "tensor", np.float32(old), np.float32(new), None, tolerance)
    return found


def test_the_sign_of_a_zero_is_a_bit():
    for old in ([0.0, 1.0], [0.0, 0.0]):
        new = [-0.0, old[1]]
        exact = judged(old, new, 0.0)
        assert [problem.what for problem in exact.problems] == [
            "is not what the recipe gives: the sign of a zero differs"
        ]
        near = judged(old, new, 1e-5)
        assert (near.problems, near.worst, exact.worst) == ([], 0.0, 0.0)


def test_what_differs_by_more_than_is_allowed_is_told():
    assert not judged([1.0, 2.0], [1.0, 2.00001], 1e-5).problems
    (problem,) = judged([1.0, 2.0], [1.0, 2.1], 1e-5).problems
    assert "differs by 0.043 of its update, where 1e-05 is allowed" in problem.what
