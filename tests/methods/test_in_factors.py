"""The rules that keep D and τ in factors: what comes out is what dense matrices give."""

import jax
import numpy as np
import pytest

from nufilt_jax import methods
from nufilt_jax.linalg.factored import Factored
from nufilt_jax.methods.adapter_only import AdapterOnlyConfig
from nufilt_jax.methods.nufilt import NufiltConfig
from nufilt_jax.methods.null_space import NullSpaceConfig
from nufilt_jax.methods.stacked import task_vector

NAMES = ("model.layers.0.a.weight", "model.layers.0.b.weight", "model.layers.1.a.weight")
SHAPES = dict(zip(NAMES, ((60, 48), (40, 48), (60, 48)), strict=True))
RANKS = dict(filter_rank=5, adapter_rank=3, task_rank=2)
CONFIGS = {
    "sum": ("sum", None),
    "weight_average": ("weight_average", None),
    "task_arithmetic": ("task_arithmetic", None),
    "null_space": ("null_space", NullSpaceConfig(filter_rank=5)),
    "adapter_only": ("adapter_only", AdapterOnlyConfig(steps=6, **RANKS)),
    "text": ("adapter_only", AdapterOnlyConfig(steps=6, variant="text", **RANKS)),
    "adam": ("nufilt", NufiltConfig(steps=6, learning_rate=1e-2, **RANKS)),
    "svd": ("nufilt", NufiltConfig(steps=6, decomposition="svd", **RANKS)),
    "closed_form": ("nufilt", NufiltConfig(solver="closed_form", ridge=0.1, **RANKS)),
    "rank 0": ("nufilt", NufiltConfig(filter_rank=0, adapter_rank=0, task_rank=0)),
    "authors": ("nufilt", NufiltConfig(steps=2, first_task="authors", **RANKS)),
}


class Adapter(dict):
    """A task of factors `{name: (B, A)}`, as the checkpoints of adapters tell their changes."""

    def change(self, name):
        return self.get(name)

    def is_unchanged(self, name):
        return name not in self


@pytest.fixture(scope="module")
def base():
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def adapter(seed, rank=2, names=NAMES, size=0.1):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: size * rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return Adapter({name: (draw(SHAPES[name][0], rank), draw(rank, SHAPES[name][1])) for name in names})


def merged(base, tasks, rule, config, ranks=None):
    """D after some tasks, dense and in float64, and the last state."""
    merger = methods.get(rule, config, layers="weight", ranks=ranks)
    state = merger.init(base)
    for number, task in enumerate(tasks):
        wanted = [ranks[members[0]][number] if ranks else None for members in state.delta.names]
        state = merger.update(state, task_vector(base, task, state.delta.names, wanted), donate=True)
    return {name: np.asarray(state.merged[name], np.float64) for name in NAMES}, state


def assert_close(ours, theirs):
    for name in NAMES:
        assert np.linalg.norm(ours[name] - theirs[name]) <= 1e-5 * np.linalg.norm(theirs[name]), name


@pytest.mark.parametrize("case", CONFIGS)
def test_the_same_as_of_dense_matrices(base, case):
    rule, config = CONFIGS[case]
    tasks = [adapter(1), adapter(2, rank=3), adapter(3)]
    ours, state = merged(base, tasks, rule, config, dict.fromkeys(NAMES, (2, 3, 2)))
    theirs, whole = merged(base, tasks, rule, config)
    assert all(isinstance(stack, Factored) and stack.rank == 7 for stack in state.delta.stacks)
    assert_close(ours, theirs)
    for name, report in whole.report.items():
        assert state.report[name].has_losses == report.has_losses
        if report.has_losses:
            np.testing.assert_allclose(state.report[name].losses, report.losses, rtol=1e-3, atol=1e-9)
        for field in ("removed_share", "restored_share", "drift", "captured") if report.forecast else ():
            mine, other = (getattr(x.forecast, field) for x in (state.report[name], report))
            np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-5)


def test_bases_stay_orthonormal(base):
    tasks = [adapter(seed) for seed in range(4)]
    _, state = merged(base, tasks, *CONFIGS["null_space"], dict.fromkeys(NAMES, (2,) * 4))
    for stack in state.delta.stacks:
        for q in np.asarray(stack.basis):
            np.testing.assert_allclose(q.T @ q, np.eye(8), atol=3e-6)


@pytest.mark.parametrize("case", ["sum", "null_space", "closed_form"])
def test_adapters_that_have_nothing_new(base, case):
    """The same adapter twice, and one that was never trained: B = 0.

    Adam is left out: of the same task twice its target is rounding alone, and so are the signs of its steps.
    """
    untrained = Adapter({name: (0 * b, a) for name, (b, a) in adapter(5).items()})
    tasks = [untrained, adapter(1), untrained, adapter(1), adapter(2)]
    ours, state = merged(base, tasks, *CONFIGS[case], dict.fromkeys(NAMES, (2,) * 5))
    theirs, _ = merged(base, tasks, *CONFIGS[case])
    assert_close(ours, theirs)
    assert np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.delta.stacks)])).all()


@pytest.mark.parametrize("case", ["task_arithmetic", "adam"])
def test_layers_that_not_every_task_adapts(base, case):
    """Each layer has the ranks of the tasks that adapt it; one that none adapts stays as it was."""
    tasks = [adapter(1, names=NAMES[:1]), adapter(2, names=NAMES[::2])]
    ranks = {NAMES[0]: (2, 2), NAMES[1]: (0, 0), NAMES[2]: (0, 2)}
    ours, state = merged(base, tasks, *CONFIGS[case], ranks)
    theirs, _ = merged(base, tasks, *CONFIGS[case])
    assert not ours[NAMES[1]].any() and set(state.report) == set(NAMES if case == "adam" else ())
    assert_close(ours, theirs)


def test_an_adapter_on_a_dense_merge(base):
    """A whole fine-tune before: D is dense, and τ may be factored all the same."""
    rng = np.random.default_rng(0)
    full = {name: 0.1 * rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    merger = methods.get("nufilt", CONFIGS["adam"][1], layers="weight")
    state = merger.update(merger.init(base), full)
    thin = task_vector(base, adapter(1), state.delta.names, [2, 2])
    whole = task_vector(base, adapter(1), state.delta.names)
    ours, theirs = (merger.update(state, task).merged for task in (thin, whole))
    assert_close({n: np.asarray(ours[n]) for n in NAMES}, {n: np.asarray(theirs[n]) for n in NAMES})
