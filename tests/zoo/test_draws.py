import sys

import numpy as np
import pytest

from nufilt_jax.errors import ConfigError, MissingExtraError
from nufilt_jax.zoo import CLASS_NAMES, STUDY_TASKS, draw
from nufilt_jax.zoo.draws import HARD, MILD, digit_originals


@pytest.mark.parametrize("task", STUDY_TASKS)
def test_draw(task):
    n_classes = len(CLASS_NAMES[task])
    images, labels = draw(task, "test", 7 * n_classes)
    assert images.shape == (7 * n_classes, 3, 32, 32)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    if task == "digits":
        assert set(labels) == set(range(10))
    else:
        np.testing.assert_array_equal(np.bincount(labels), np.full(n_classes, 7))
    # Each image shows something: it is neither flat nor all black and white.
    spread = images.reshape(len(images), -1).std(axis=1)
    assert spread.min() > 1
    assert np.isin(images, (0, 255)).mean() < 0.5


@pytest.mark.parametrize("task", STUDY_TASKS)
def test_the_same_arguments_give_the_same_bits(task):
    for first, second in zip(draw(task, "val", 20), draw(task, "val", 20), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("task", STUDY_TASKS)
def test_splits_and_nuisances_share_no_image(task):
    drawn = [draw(task, split, 60)[0] for split in ("train", "val", "test")] + [draw(task, "train", 60, MILD)[0]]
    images = {image.tobytes() for images in drawn for image in images}
    assert len(images) == 4 * 60


def test_digits_of_the_splits_come_from_other_originals():
    used = {}
    for split in ("train", "val", "test"):
        glyphs, labels = digit_originals(split)
        assert len(labels) == len(glyphs)
        used[split] = {glyph.tobytes() for glyph in glyphs}
    assert [len(used[split]) for split in ("train", "val", "test")] == [1000, 297, 500]
    assert not used["train"] & used["test"]
    assert not used["train"] & used["val"]
    assert not used["val"] & used["test"]


def test_digits_repeat_no_original_before_all_were_shown():
    _, classes = digit_originals("test")
    _, labels = draw("digits", "test", 500)
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(classes))


def test_classes_look_different():
    # Without nuisance of place and colour the mean images of two classes are far apart.
    for task in ("letters", "shapes"):
        images, labels = draw(task, "train", 200, MILD)
        grey = np.abs(images.mean(axis=1) - images.mean(axis=(1, 2, 3))[:, None, None])
        means = [grey[labels == index].mean(axis=0) for index in range(len(CLASS_NAMES[task]))]
        gaps = [np.abs(a - b).mean() for i, a in enumerate(means) for b in means[:i]]
        assert min(gaps) > 1  # grey levels of 255, averaged over all pixels


def test_every_task_has_a_look_of_its_own():
    assert set(HARD) == set(STUDY_TASKS)
    assert len(set(HARD.values())) == len(STUDY_TASKS)


def test_unknown_task():
    with pytest.raises(ConfigError, match="no built-in task 'cats'"):
        draw("cats", "test", 1)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match="scikit-learn is not installed and the task `digits` needs it"):
        draw("digits", "test", 1)
    draw("shapes", "test", 1)
