import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_towers import CONFIG, random_params

from nufilt_jax import methods
from nufilt_jax.errors import CheckpointError, ConfigError
from nufilt_jax.evaluation import accuracy, normalise_head
from nufilt_jax.evaluation.learning_data import clip_task_data, shuffled_batches
from nufilt_jax.methods import adaptation
from nufilt_jax.methods.adamerging import AdaMergingConfig
from nufilt_jax.methods.wemoe import WemoeConfig
from nufilt_jax.models import clip_image_features

WHOLE = {"model_type": "clip", "vision_config": {k: v for k, v in CONFIG.items() if k != "model_type"}}


def numbered_images(n):
    """Images that tell their number."""
    return np.arange(n, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 4, 4), np.float32)


def numbers(batch):
    return batch["pixel_values"][:, 0, 0, 0].astype(int).tolist()


def head_of(n_classes, seed=0):
    return normalise_head(np.random.default_rng(seed).standard_normal((n_classes, 8)))


def task_data(n=40, n_classes=4, labels=None, config=CONFIG, images=None, **options):
    options = {"steps": 6, "batch_size": 4, "examples_per_class": 3, "seed": 5} | options
    return clip_task_data(
        numbered_images(n) if images is None else images, head_of(n_classes), labels, config, **options
    )


def test_every_class_gives_its_share():
    labels = np.array([0] * 20 + [1] * 2 + [2] * 17 + [3])  # two classes have fewer than three images
    batches, _ = task_data(labels=labels, batch_size=3 + 2 + 3 + 1)
    passes = [numbers(batch) for batch in batches]
    seed_set = set(passes[0])
    assert np.bincount(labels[sorted(seed_set)]).tolist() == [3, 2, 3, 1]
    assert all(sorted(rows) == sorted(seed_set) for rows in passes)  # each pass is the whole set
    assert len({tuple(rows) for rows in passes}) == 6  # in another order


def test_without_labels_as_many_are_drawn():
    batches, _ = task_data(batch_size=12)
    assert len(set(numbers(next(batches)))) == 4 * 3
    batches, _ = task_data(n=5, batch_size=5)
    assert set(numbers(next(batches))) == set(range(5))


def test_batches_have_one_size_and_no_example_comes_before_all_have_come():
    batches = list(shuffled_batches(range(10), steps=7, batch_size=4, generator=random.Random(0)))
    assert [len(rows) for rows in batches] == [4] * 7
    drawn = list(itertools.chain(*batches))
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    assert drawn[:10] != drawn[10:20]
    [small] = shuffled_batches([3, 8], steps=1, batch_size=5, generator=random.Random(0))
    assert sorted(small[:2]) == sorted(small[2:4]) == [3, 8]


def test_the_draw_depends_on_the_seed_alone():
    first, again, other = ([numbers(b) for b in task_data(seed=seed)[0]] for seed in (5, 5, 6))
    assert first == again != other
    assert len(first) == 6


@pytest.mark.parametrize("scale", [None, 2.5])
def test_forward_is_the_zero_shot_classifier(scale):
    params = random_params(**({} if scale is None else {"visual_projection.weight": (8, 8)}))
    config = CONFIG if scale is None else WHOLE
    extra = {} if scale is None else {"logit_scale": np.float32(scale), "text_projection.weight": np.eye(8)}
    images = np.random.default_rng(1).standard_normal((9, 3, 4, 4)).astype(np.float32)
    batches, forward = task_data(config=config, images=images, n_classes=3, batch_size=9, steps=1)
    [batch] = batches
    logits = np.asarray(jax.jit(forward)({n: jnp.asarray(x) for n, x in (params | extra).items()}, batch))
    features = np.asarray(clip_image_features(params, jnp.asarray(batch["pixel_values"]), CONFIG), np.float64)
    wanted = features / np.linalg.norm(features, axis=1, keepdims=True) @ head_of(3).T
    np.testing.assert_allclose(logits[:, :3], wanted * (100 if scale is None else np.exp(scale)), rtol=1e-4, atol=1e-3)
    assert logits.shape == (9, 512) and np.isneginf(logits[:, 3:]).all()


def test_more_classes_than_the_least_padding():
    [batch] = task_data(n_classes=600, steps=1)[0]
    assert batch["prototypes"].shape == (1024, 8)
    assert batch["is_class"].sum() == 600


def test_one_forward_function_per_config():
    assert task_data()[1] is task_data(n_classes=7, seed=1)[1]
    assert task_data()[1] is not task_data(config=WHOLE)[1]
    assert task_data()[1] is not task_data(config=CONFIG | {"layer_norm_eps": 1e-6})[1]


def test_half_precision_images_are_widened():
    [batch] = task_data(images=numbered_images(9).astype(np.float16), steps=1)[0]
    assert batch["pixel_values"].dtype == np.float32


def test_unusable_examples_are_refused():
    with pytest.raises(ConfigError, match="data: there are 0 images"):
        task_data(n=0)
    with pytest.raises(ConfigError, match="data: there are 40 images, labels: 39"):
        task_data(labels=np.zeros(39, np.int64))
    with pytest.raises(CheckpointError, match="model_type is 't5'"):
        task_data(config={"model_type": "t5"})


@pytest.mark.parametrize(
    "config",
    [
        AdaMergingConfig(steps=10, learning_rate=1e-2, batch_size=8),
        WemoeConfig(steps=10, learning_rate=3e-2, batch_size=8, first_rank=4, later_rank=2),
    ],
    ids=["adamerging", "wemoe"],
)
def test_a_tower_learns_from_them(config):
    """Both rules end to end: tasks of 3 and 5 classes, one program per model; the result is evaluated as it is."""
    name = "wemoe" if isinstance(config, WemoeConfig) else "adamerging"
    base = random_params()
    rule = methods.get(name, config)
    state = rule.init(base | {"vision_model.embeddings.position_ids": np.arange(5)[None]})
    rng = np.random.default_rng(2)
    images = rng.standard_normal((30, 3, 4, 4)).astype(np.float32)
    before = adaptation._step._cache_size()
    for seed, n_classes in ((1, 3), (2, 5)):
        options = {"steps": config.steps, "batch_size": config.batch_size, "examples_per_class": 5, "seed": seed}
        labels = rng.integers(0, n_classes, 30)
        data = methods.TaskData(*clip_task_data(images, head_of(n_classes), labels, CONFIG, **options))
        state = rule.update(state, random_params(seed, base), data=data)
        losses = state.report["model"].losses
        assert losses[-3:].mean() < 0.9 * losses[:3].mean()
    assert adaptation._step._cache_size() - before == (2 if name == "wemoe" else 1)
    merged = state.merged
    assert len(merged) == len(base) + 1 + (2 + 2 * 2 * 2 if name == "wemoe" else 0)
    features = clip_image_features(merged, jnp.asarray(images), CONFIG)
    head = normalise_head(np.asarray(features)[:2])
    assert accuracy(merged, CONFIG, images, np.zeros(30, np.int64), head) > 0
