"""The benchmarks' PyTorch contenders solve the problem that the package solves."""

import functools

import jax
import numpy as np
import pytest
import torch

from benchmarks.common import shapes
from benchmarks.speed import torch_batched, torch_reference
from benchmarks.speed.torch_common import to_numpy
from nufilt_jax.core.solve import solve_group
from nufilt_jax.methods.nufilt import NufiltConfig

CONFIG = NufiltConfig(filter_rank=8, adapter_rank=6, task_rank=3)
LAYERS = {"q": (48, 48), "k": (48, 48), "up": (120, 48), "down": (48, 120)}  # two widths, and two shapes of one
TOLERANCE = 1e-5  # float32 over 50 Adam steps; 2e-6 was measured


@functools.cache
def inputs():
    return shapes.inputs(LAYERS, CONFIG.adapter_rank)


@functools.cache
def ours():
    found = {}
    for group in shapes.grouped(LAYERS):
        start = np.stack([inputs().start[name] for name in group.names])
        stacks = (shapes.stacked(group, part) for part in (inputs().merged, inputs().task))
        solution = jax.jit(solve_group, static_argnames="config")(*stacks, start, config=CONFIG)
        for names, stack in zip(group.stacks, jax.block_until_ready(solution).updates, strict=True):
            found |= dict(zip(names, np.asarray(stack), strict=True))
    return found


@pytest.fixture
def no_compiler(monkeypatch):
    """`torch.compile` takes seconds, and a machine may have no compiler: the contender must do without."""

    def fail(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)


@pytest.mark.parametrize("name", ["torch", "torch-released", "torch-batched"])
def test_updates_are_ours(name, no_compiler):
    contender = torch_reference.contender(name, inputs(), CONFIG, "cpu")
    outcome = contender.run()
    for layer, update in to_numpy(outcome.updates).items():
        error = np.linalg.norm(update - ours()[layer]) / np.linalg.norm(ours()[layer])
        assert error < TOLERANCE, layer
    assert {"decompose", "adam", "fuse", "total"} <= outcome.stages.keys()
    parts = sum(seconds for stage, seconds in outcome.stages.items() if stage != "total")
    assert outcome.stages["total"] == pytest.approx(parts)


def test_a_second_run_gives_the_same(no_compiler):
    contender = torch_reference.contender("torch-batched", inputs(), CONFIG, "cpu")
    first, second = (to_numpy(contender.run().updates) for _ in range(2))
    for name, update in first.items():
        np.testing.assert_allclose(update, second[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("iterate", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_routes_of_the_batched_form_agree(iterate, threads):
    grams = torch_batched._grams([torch.from_numpy(np.stack([inputs().task["q"], inputs().task["k"]]))])
    plan = torch_batched.Plan(iterate=iterate, threads=threads)
    for found in torch_batched._decompose(grams, grams, plan, CONFIG):
        wanted = torch.linalg.eigh(grams.double())[1][:, :, -found.shape[2] :]
        overlap = torch.linalg.svdvals(wanted.mT @ found.double())
        assert float(overlap.min()) > 1 - 1e-6


def test_what_could_not_run_leaves_its_reason(no_compiler):
    notes = torch_reference.contender("torch-batched", inputs(), CONFIG, "cpu").notes
    assert set(notes) == {"48", "120"}
    failed = [seconds for seconds in notes["48"]["trials"].values() if isinstance(seconds, str)]
    assert failed == ["RuntimeError: no compiler"]
    assert "steps eager" in notes["48"]["plan"]


def test_both_objectives_are_the_same_number():
    layer = torch_reference._layer(*(torch.from_numpy(part["up"]) for part in inputs()[:2]), CONFIG)
    a, b = (torch.from_numpy(x) for x in (1.0 * inputs().start["up"], 0.1 * inputs().start["up"].T))
    printed, released = torch_reference.printed_objective(layer, a, b), torch_reference.released_objective(layer, a, b)
    assert float(released) == pytest.approx(float(printed), rel=1e-5)
