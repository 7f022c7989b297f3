import numpy as np
import pytest

from nufilt_jax.analysis.forecast import (
    accuracy_lost,
    forecast_layers,
    forecast_values,
    layer_agreement,
    rank_correlation,
)
from nufilt_jax.analysis.layers import LAYER_GROUPS, by_block, in_group, short

STEPS = [
    {"layers": {}},
    {"layers": {"a": {"drift": 0.5, "removed_share": None}, "b": {"drift": 0.25}}},
    {"layers": {"b": {"drift": 0.125}}},
]


def spearman(a, b):
    """Pearson's correlation of ranks, counted one by one; ties share the mean of theirs."""

    def ranks(values):
        return np.array([np.mean([sum(w < v for w in values), sum(w <= v for w in values) - 1]) for v in values])

    x, y = ranks(a) - ranks(a).mean(), ranks(b) - ranks(b).mean()
    return (x @ y) / np.sqrt((x @ x) * (y @ y))


def test_forecast_as_arrays():
    assert forecast_layers(STEPS) == ("a", "b")
    np.testing.assert_array_equal(
        forecast_values(STEPS, "drift", ["b", "a"]), [[np.nan, np.nan], [0.25, 0.5], [0.125, np.nan]]
    )
    assert np.isnan(forecast_values(STEPS, "removed_share", ["a"])).all()
    assert forecast_values([], "drift", []).shape == (0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_rank_correlation(seed):
    rng = np.random.default_rng(seed)
    a = np.round(rng.normal(size=12), 1)
    b = np.round(a + rng.normal(size=12), 1)
    a[3:5] = a[0]  # ties
    assert rank_correlation(a, b) == pytest.approx(spearman(a, b))
    assert rank_correlation(a, -b) == pytest.approx(-rank_correlation(a, b))
    assert rank_correlation(np.exp(a), b) == pytest.approx(rank_correlation(a, b))


def test_too_little_to_tell():
    three = np.array([1.0, 2.0, 3.0])
    assert rank_correlation(three, np.array([1.0, np.nan, 5.0, 9.0])[[0, 2, 3]]) == pytest.approx(1)
    assert np.isnan(rank_correlation(three, np.array([1.0, np.nan, 5.0])))
    assert np.isnan(rank_correlation(three, np.ones(3)))


def test_agreement_by_step_and_pooled():
    told = np.array([[np.nan] * 4, [1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    measured = np.array([[1.0] * 4, [5.0, 6.0, 7.0, 8.0], [4.0, 3.0, 2.0, 1.0]])
    found = layer_agreement(told, measured)
    np.testing.assert_allclose(found.by_step, [np.nan, 1, -1])
    assert found.pooled == pytest.approx(spearman(told[1:].ravel(), measured[1:].ravel()))


def test_accuracy_lost():
    accuracies = np.array([[0.9, 0.8, 0.5], [0.1, 0.7, 0.6], [0.2, 0.3, 0.9]])
    np.testing.assert_allclose(accuracy_lost(accuracies), [np.nan, 0.1, 0.2])


def test_layers_in_groups_and_blocks():
    clip = "vision_model.encoder.layers.{}.{}.weight".format
    names = [clip(10, "mlp.fc1"), clip(2, "mlp.fc2"), clip(2, "self_attn.out_proj"), clip(2, "self_attn.q_proj")]
    assert [in_group(names, group).tolist() for group in LAYER_GROUPS] == [
        [True] * 4,
        [False, False, True, True],
        [True, True, False, False],
    ]
    assert by_block(names) == (("2", (names[3], names[2], names[1])), ("10", (names[0],)))
    assert [short(name) for name in names] == ["fc1", "fc2", "out", "q"]
    t5 = ["encoder.block.0.layer.1.DenseReluDense.wi.weight", "decoder.block.0.layer.0.SelfAttention.q.weight"]
    assert by_block([*t5, "shared.weight"]) == (("rest", ("shared.weight",)), ("dec 0", (t5[1],)), ("enc 0", (t5[0],)))
    assert in_group(t5, "attention").tolist() == [False, True] and in_group(t5, "MLP").tolist() == [True, False]
