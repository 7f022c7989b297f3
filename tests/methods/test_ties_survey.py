"""TIES of a model in parts: looks at each of them find the thresholds and the majority of the whole."""

import dataclasses

import chex
import numpy as np
import pytest
from matrix_models import SHARED, T5, draw

from nufilt_jax import methods
from nufilt_jax.methods.selection import Selection
from nufilt_jax.methods.stacked import task_vector
from nufilt_jax.methods.ties import TiesConfig, cut_order

BASE = {name: np.zeros(shape, np.float32) for name, shape in T5.items()}


def surveyed(config, state, vector):
    """What the survey finds of a model of which every stack is a part of its own."""
    found = {}
    for number, look in enumerate(methods.RULES["ties"].looks(state.step)):
        parts = []
        for members in vector.names:
            rule = methods.get("ties", config, selection=Selection(members, ()))
            part = dataclasses.replace(state, base={name: BASE[name] for name in members})
            parts.append(rule.look(part, vector, number, found))
        found = look.joined(parts, config, found)
    return found


@pytest.mark.parametrize("density", [0, 0.2, 1])
@pytest.mark.parametrize("kind", ["normal", "equal", "opposite", "sparse", "subnormal"])
def test_a_survey_of_parts_finds_what_the_whole_model_has(kind, density):
    first, second = draw(T5, 0), draw(T5, 1)
    if kind == "equal":
        first, second = ({name: np.full_like(x, 2) for name, x in first.items()} for _ in range(2))
    elif kind == "opposite":
        second = {name: -x for name, x in first.items()}
    elif kind == "sparse":
        first, second = ({name: x * (x > 0.01) for name, x in each.items()} for each in (first, second))
    elif kind == "subnormal":
        second = {name: (np.float64(1e-41) * x).astype(np.float32) for name, x in second.items()}
    for variant in ("code", "text"):
        config = TiesConfig(variant=variant, scale=1.0, density=density, embedding_copies=3)
        rule = methods.get("ties", config)
        state = rule.update(rule.init(BASE), first)
        vector = task_vector(BASE, second, state.delta.names)
        numbers = surveyed(config, state, vector)
        for row, operand in zip(numbers["cuts"], (dict(state.extra or state.delta), second), strict=True):
            order = np.sort(abs(np.concatenate([np.ravel(operand[name]) for name in (*T5, SHARED, SHARED)])))
            k = cut_order(len(order), density)
            assert row.view(np.uint32) == (order[k - 1] if k else np.float32(0)).view(np.uint32)
        given, alone = (rule.update(state, vector, numbers=each) for each in (numbers, {}))
        chex.assert_trees_all_equal((given.delta, given.extra), (alone.delta, alone.extra))
