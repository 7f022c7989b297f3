import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_towers import CONFIG, random_params

from nufilt_jax.errors import CheckpointError, ConfigError
from nufilt_jax.evaluation import Task, accuracy, class_logits, evaluate_tasks, normalise_head, orthogonal_head
from nufilt_jax.evaluation.in_memory import _check
from nufilt_jax.evaluation.scoring import _count_hits
from nufilt_jax.models import clip_image_features


def random_task(name="a", n=23, n_classes=5, seed=0, dim=8):
    rng = np.random.default_rng(seed)
    return Task(
        name=name,
        images=rng.standard_normal((n, 3, 4, 4)).astype(np.float32),
        labels=rng.integers(0, n_classes, n),
        head=normalise_head(rng.standard_normal((n_classes, dim))),
        class_names=tuple(str(index) for index in range(n_classes)),
    )


def accuracy_by_hand(params, task):
    features = np.asarray(clip_image_features(params, jnp.asarray(task.images), CONFIG), np.float64)
    right = 0
    for feature, label in zip(features, task.labels, strict=True):
        cosines = [feature @ row / np.linalg.norm(feature) for row in task.head]
        right += cosines.index(max(cosines)) == label
    return right / len(task.labels)


@pytest.mark.parametrize("batch_size", [7, 23, 64])
def test_accuracy_does_not_depend_on_the_batch_size(batch_size):
    params, task = random_params(), random_task()
    wanted = accuracy_by_hand(params, task)
    assert 0 < wanted < 1
    scored = accuracy(params, CONFIG, task.images, task.labels, task.head, batch_size=batch_size)
    assert scored == pytest.approx(wanted)


def with_experts(params, seed=1):
    """Two experts in each matrix, with gates so large that every image of a batch matters to all others."""
    rng = np.random.default_rng(seed)
    mlp = "vision_model.encoder.layers.0.mlp"
    shapes = {f"{mlp}.gate.weight": (2, 8), f"{mlp}.gate.bias": (2,)}
    for part, (m, n) in {"fc1": (12, 8), "fc2": (8, 12)}.items():
        for i in range(2):
            shapes |= {f"{mlp}.{part}.experts.{i}.a": (3, n), f"{mlp}.{part}.experts.{i}.b": (m, 3)}
    return params | {name: rng.normal(0, 2.5, shape).astype(np.float32) for name, shape in shapes.items()}


def answers(params, images, head):
    """The best class of every image, all in one batch."""
    features = jax.jit(lambda p, x: clip_image_features(p, x, CONFIG))(params, images)
    return np.argmax(np.asarray(features) @ head.T, axis=1)


def test_images_that_fill_a_batch_never_reach_a_mixture():
    """Labels are the answers in batches of 128 images with 22 left over: in other company some come out wrong."""
    params, task = with_experts(random_params()), random_task(n=150, n_classes=60)
    # Unlike the others, so that it matters who is in their batch.
    rest = task.images[128:] + np.linspace(-2, 2, 4, dtype=np.float32)
    images, filled = np.concatenate([task.images[:128], rest]), np.pad(rest, ((0, 106), (0, 0), (0, 0), (0, 0)))
    labels = np.concatenate([answers(params, part, task.head) for part in (images[:128], rest)])
    assert (answers(params, filled, task.head)[:22] != labels[128:]).any()
    score = functools.partial(accuracy, params, CONFIG, images, labels, task.head)
    assert score() == score(batch_size=128) == 1.0
    assert score(batch_size=150) < 1.0
    assert accuracy(params, CONFIG, rest, labels[128:], task.head, batch_size=64) == 1.0


def test_padded_classes_never_win():
    # Every cosine with the only class is negative, so a padded class of zeros would win without its mask.
    params, task = random_params(), random_task(n_classes=1)
    features = clip_image_features(params, jnp.asarray(task.images[:1]), CONFIG)
    head = normalise_head(-np.asarray(features))
    assert accuracy(params, CONFIG, task.images[:1], task.labels[:1], head) == 1.0


def test_padded_images_never_count():
    # All images are alike and right; fill-in images would be counted too if their label were a class.
    params, task = random_params(), random_task(n=3)
    images = np.zeros_like(task.images)
    feature = np.asarray(clip_image_features(params, jnp.asarray(images[:1]), CONFIG))
    head = normalise_head(np.concatenate([feature, -feature]))
    assert accuracy(params, CONFIG, images, np.zeros(3, np.int64), head, batch_size=64) == 1.0


def test_tasks_are_scored_by_name():
    params = random_params()
    tasks = [
        random_task("a", seed=1),
        random_task("b", n=40, n_classes=3, seed=2),
        random_task("c", n_classes=8),
    ]
    scores = evaluate_tasks(params, CONFIG, tasks, batch_size=16)
    assert scores == pytest.approx({task.name: accuracy_by_hand(params, task) for task in tasks})
    assert list(scores) == ["a", "b", "c"]


def test_more_classes_than_the_least_padding():
    params, task = random_params(), random_task(n=200, n_classes=600)
    scores = evaluate_tasks(params, CONFIG, [task])
    assert scores["a"] == pytest.approx(accuracy_by_hand(params, task))


def test_one_compilation_for_all_models_and_tasks():
    _count_hits.clear_cache()
    for seed in range(2):
        tasks = [random_task(str(n), n=n, n_classes=n_classes) for n, n_classes in [(9, 2), (30, 7), (16, 8)]]
        evaluate_tasks(random_params(seed), CONFIG, tasks, batch_size=16)
    assert _count_hits._cache_size() == 1


def test_bytes_are_normalised_as_the_preprocessor_does():
    raw = np.random.default_rng(0).integers(0, 256, (8, 3, 4, 4), dtype=np.uint8)
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)
    pixels = np.stack([(raw[:, i] / 255 - mean[i]) / std[i] for i in range(3)], axis=1).astype(np.float32)
    # Every image is a class of its own, so that only its own features find it.
    head = normalise_head(np.asarray(clip_image_features(random_params(), jnp.asarray(pixels), CONFIG)))
    fields = {"labels": np.arange(8), "head": head, "class_names": tuple("abcdefgh")}
    tasks = [
        Task(name="raw", images=raw, mean=mean, std=std, **fields),
        Task(name="ready", images=pixels, **fields),
        Task(name="wrong", images=raw, **fields),
    ]
    scores = evaluate_tasks(random_params(), CONFIG, tasks, batch_size=8)
    assert scores["raw"] == scores["ready"] == 1.0
    assert scores["wrong"] < 1.0


def test_projected_features_meet_a_head_of_their_size():
    params = random_params(**{"visual_projection.weight": (6, 8)})
    task = random_task(dim=6)
    assert evaluate_tasks(params, CONFIG, [task])["a"] == pytest.approx(accuracy_by_hand(params, task))
    with pytest.raises(ConfigError, match="class embeddings have 8 dimensions, the model's features 6"):
        evaluate_tasks(params, CONFIG, [random_task(dim=8)])


def test_logits():
    head = np.eye(2, 3, dtype=np.float32)
    features = np.array([[3, 4, 0], [0, 0, 0], [0, -2, 0]], np.float32)
    logits = class_logits(jnp.asarray(features), jnp.asarray(head), 10.0)
    np.testing.assert_allclose(logits, [[6, 8], [0, 0], [0, -10]], rtol=1e-6)


def test_orthogonal_head():
    head = orthogonal_head(5, 9, seed=3)
    np.testing.assert_allclose(head @ head.T, np.eye(5), atol=1e-6)
    np.testing.assert_array_equal(head, orthogonal_head(5, 9, seed=3))
    assert np.abs(head - orthogonal_head(5, 9, seed=4)).max() > 0.1
    with pytest.raises(ConfigError, match="10 orthogonal classes do not fit into 9"):
        orthogonal_head(10, 9, seed=0)


def test_normalise_head():
    np.testing.assert_allclose(normalise_head(np.array([[3.0, 4.0]])), [[0.6, 0.8]], rtol=1e-6)
    for bad in (0.0, np.nan, np.inf):
        with pytest.raises(ConfigError, match="zero or not finite"):
            normalise_head(np.array([[1.0, 0.0], [bad, 0.0]]))


def test_unusable_tasks_are_refused():
    task = random_task()
    with pytest.raises(ConfigError, match="names stand twice: a"):
        evaluate_tasks(random_params(), CONFIG, [task, task])
    with pytest.raises(ConfigError, match="batch_size: must be at least 1, got 0"):
        evaluate_tasks(random_params(), CONFIG, [task], batch_size=0)
    with pytest.raises(ConfigError, match="task a: 23 images and 22 labels"):
        _check(task.images, task.labels[1:], task.head, "task a")  # elsewhere the annotations see it first
    with pytest.raises(ConfigError, match="0 images and 0 labels"):
        accuracy(random_params(), CONFIG, task.images[:0], task.labels[:0], task.head)
    with pytest.raises(ConfigError, match="the head has 2 classes"):
        accuracy(random_params(), CONFIG, task.images, task.labels, task.head[:2])
    with pytest.raises(ConfigError, match="1 class names for a head of 5 classes"):
        Task(name="a", images=task.images, labels=task.labels, head=task.head, class_names=("x",))


def test_foreign_parameters_are_refused():
    params = random_params() | {"classifier.weight": np.zeros((2, 8), np.float32)}
    with pytest.raises(CheckpointError, match=r"classifier\.weight"):
        evaluate_tasks(params, CONFIG, [random_task()])
