"""A stream merged with many settings at once against the method itself, setting by setting."""

import dataclasses

import numpy as np
import pytest

from benchmarks.study.rank_sweep import Ranks, figure_4, merge_settings
from nufilt_jax import NufiltConfig, methods
from nufilt_jax.errors import ConfigError

BLOCK = "vision_model.encoder.layers.{}.{}.weight"
SHAPES = {
    BLOCK.format(layer, name): shape
    for layer in range(2)
    for name, shape in (("self_attn.q_proj", (16, 16)), ("mlp.fc1", (24, 16)), ("mlp.fc2", (16, 24)))
}
SETTINGS = (Ranks(6, 0, 0), Ranks(6, 4, 2), Ranks(3, 2, 3))
ADAM = NufiltConfig(steps=6, learning_rate=3e-3, decomposition="svd")


def models(n_tasks):
    rng = np.random.default_rng(0)
    base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    decay = np.linspace(1, 0.2, 16)

    def fine_tuned():
        return {
            name: (x + 0.1 * rng.normal(size=x.shape) * np.resize(decay, x.shape[1])).astype(np.float32)
            for name, x in base.items()
        }

    return base, [fine_tuned() for _ in range(n_tasks)]


def test_every_setting_is_the_method_with_those_ranks():
    base, tasks = models(3)
    streams = list(merge_settings(base, tasks, SETTINGS, seed=5, config=ADAM))
    assert len(streams) == 3
    for setting, ranks in enumerate(SETTINGS):
        rule = methods.get("nufilt", dataclasses.replace(ADAM, **ranks._asdict()), seed=5)
        state = rule.init(base)
        for step, task in enumerate(tasks):
            state = rule.update(state, task)
            found = streams[step][setting]
            assert found.keys() == base.keys()
            for name, wanted in state.merged.items():
                scale = np.linalg.norm(state.delta[name]) if name in state.delta else 0
                error = np.linalg.norm(np.asarray(found[name]) - np.asarray(wanted))
                assert error <= 1e-4 * scale, (ranks, step, name)


def test_the_closed_form_is_not_swept():
    base, tasks = models(1)
    with pytest.raises(ConfigError, match="solver: ranks are swept for adam alone, got closed_form"):
        next(merge_settings(base, tasks, SETTINGS, config=NufiltConfig(solver="closed_form")))


def test_settings_of_figure_4_at_the_papers_width():
    curves = figure_4(768)
    assert curves["filter_rank"] == tuple(Ranks(r, 0, 0) for r in (0, 16, 32, 64, 128, 256, 512))
    assert curves["adapter_rank"] == tuple(Ranks(128, r, 8) for r in (0, 8, 16, 32, 64, 128, 256))
    assert curves["task_rank"] == tuple(Ranks(128, 16, r) for r in (0, 4, 8, 16, 32, 64, 128))


@pytest.mark.parametrize("width", [8, 128, 256, 1024])
def test_settings_follow_the_width(width):
    for field, settings in figure_4(width).items():
        varied = [getattr(setting, field) for setting in settings]
        assert varied == sorted(set(varied)) and varied[0] == 0 and varied[-1] <= width
        held = {setting._replace(**{field: 0}) for setting in settings}
        assert len(held) == 1
        [fixed] = held
        if field != "filter_rank":
            assert fixed.filter_rank == round(width / 6)
