"""Image data sets from decoding to accuracy, against loops over one image at a time."""

import json
import math
import os
import subprocess
import sys
import threading

import image_models as build
import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import nufilt_jax as nj
from nufilt_jax.errors import CheckpointError, ConfigError, MissingExtraError
from nufilt_jax.evaluation import normalise_head, scoring
from nufilt_jax.evaluation.clip import tasks as clip_tasks
from nufilt_jax.evaluation.clip.heads import TextHeads
from nufilt_jax.evaluation.clip.tasks import open_image_task
from nufilt_jax.evaluation.ready import ReadyTask
from nufilt_jax.evaluation.specs import ImageSpec

N, N_CLASSES = 37, 9
NAMES = tuple(f"class {index}" for index in range(N_CLASSES))
TEMPLATES = ("a photo of a {}.",)


class Heads:
    """Embeddings drawn for the names, and how often they were."""

    def __init__(self, projection=None):
        self.visual_projection, self.calls = projection, []

    def __call__(self, class_names, templates):
        self.calls.append((class_names, templates))
        return normalise_head(np.random.default_rng(len(class_names)).standard_normal((len(class_names), 5)))


def pixels(image):
    """What CLIPImageProcessor does with the builder's settings, in float64."""
    image = image.convert("RGBA").convert("RGB")
    short = min(image.size)
    image = image.resize([math.floor(build.SIDE * side / short) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - build.SIDE) // 2 for side in image.size)
    values = np.asarray(image)[top : top + build.SIDE, left : left + build.SIDE] / 255
    return ((values - build.MEAN) / build.STD).transpose(2, 0, 1)


features = jax.jit(lambda params, batch: nj.models.clip_image_features(params, batch, build.CONFIG))


def answers(params, images, head):
    """Class of each image, one image after the other."""
    found = []
    for image in images:
        [feature] = np.asarray(features(params, pixels(image)[None].astype(np.float32)), np.float64)
        cosines = [feature @ row / np.linalg.norm(feature) for row in head]
        found.append(cosines.index(max(cosines)))
    return found


@pytest.fixture(scope="module")
def pictures():
    return build.images(N)


@pytest.fixture(scope="module")
def right(pictures):
    """The model's own answers."""
    found = answers(build.params(), pictures, Heads()(NAMES, TEMPLATES))
    assert len(set(found)) > 3  # else the tests are void
    return found


@pytest.fixture(scope="module")
def labels(right):
    """Half of the answers, and others in between."""
    return [label if index % 2 else (label + 1) % N_CLASSES for index, label in enumerate(right)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pictures, labels):
    return build.write_data(tmp_path_factory.mktemp("data") / "mine", pictures, labels, classes=NAMES)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(scoring, "_BATCH", 8)


def spec(folder, **changes):
    return ImageSpec(**{"dataset": str(folder), "split": "test", "templates": TEMPLATES} | changes)


def opened(folder, head=None, **changes):
    options = {"model_config": build.CONFIG, "preprocessor_config": build.PREPROCESSOR, "head": head or Heads()}
    options |= {key: changes.pop(key) for key in ("limit", "offline", "dtype", *options) if key in changes}
    return open_image_task(spec(folder, **changes), "mine", **options)


def test_accuracy_equals_a_loop(folder, right, labels, small_batches):
    head, told = Heads(), []
    task = opened(folder, head)
    assert isinstance(task, ReadyTask)
    assert (task.name, task.n_examples, head.calls) == ("mine", N, [])
    wanted = sum(a == b for a, b in zip(right, labels, strict=True)) / N
    assert 0.4 < wanted < 0.6
    score = task.score(build.params(), on_batch=lambda *progress: told.append(progress))
    assert score == pytest.approx(wanted, abs=1e-9)
    assert told == [("mine", done, N) for done in (8, 16, 24, 32, 37)]
    assert head.calls == [(NAMES, TEMPLATES)]
    other = build.params(seed=2)
    assert task.score(other) != score
    assert len(head.calls) == 1  # one head for all models


def test_every_image_meets_its_own_label(tmp_path, pictures, right, small_batches):
    data = build.write_data(tmp_path / "d", pictures, right, classes=NAMES)
    assert opened(data).score(build.params()) == 1.0
    swapped = [right[1], right[0], *right[2:]]
    assert swapped != right
    data = build.write_data(tmp_path / "e", pictures, swapped, classes=NAMES)
    assert opened(data).score(build.params()) == pytest.approx((N - 2) / N)


@pytest.mark.parametrize("limit", [1, 5, 36, 37, 1000])
def test_a_limit_spreads_evenly(folder, right, labels, limit, small_batches):
    task = opened(folder, limit=limit)
    assert task.n_examples == min(limit, N)
    rows = [index * N // task.n_examples for index in range(task.n_examples)]
    wanted = sum(right[row] == labels[row] for row in rows) / len(rows)
    assert task.score(build.params()) == pytest.approx(wanted, abs=1e-9)


def test_vision_halves_are_scored_behind_the_projection_of_the_head(folder, small_batches):
    whole = build.params()
    projection = whole["visual_projection.weight"]
    wanted = opened(folder).score(whole)
    assert opened(folder, Heads(projection)).score(build.vision_half(whole)) == wanted
    assert opened(folder, Heads(-projection)).score(build.vision_half(whole)) != wanted
    assert opened(folder, Heads(-projection)).score(whole) == wanted  # its own goes first
    with pytest.raises(ConfigError, match="task mine: class embeddings have 5 dimensions, the model's features 8"):
        opened(folder).score(build.vision_half(whole))


def test_a_real_head_and_the_whole_way(tmp_path, pictures):
    params = build.params()
    model = build.write_model(tmp_path / "model", params)
    heads = TextHeads(params, build.CONFIG, model, cache=tmp_path / "heads")
    wanted = answers(params, pictures, heads(build.CLASSES, TEMPLATES))
    assert len(set(wanted)) > 1
    data = build.write_data(tmp_path / "d", pictures, wanted)
    assert opened(data, heads).score(params) == 1.0


def test_one_compilation_for_all_tasks_and_models(tmp_path, pictures, folder, small_batches):
    scoring._count_hits.clear_cache()
    few = build.write_data(tmp_path / "few", pictures[:5], [0, 1, 2, 1, 0])
    for data in (folder, few):
        task = opened(data)
        for seed in range(2):
            task.score(build.params(seed))
    assert scoring._count_hits._cache_size() == 1


def test_bfloat16_is_near(folder, small_batches):
    scores = {dtype: opened(folder, dtype=dtype).score(build.params()) for dtype in ("float32", "bfloat16")}
    assert abs(scores["float32"] - scores["bfloat16"]) <= 3 / N


def test_labels_without_a_feature_of_their_own(tmp_path, pictures, right):
    data = build.write_data(tmp_path / "d", pictures, right, classes=None, image="jpg", label="cls")
    task = opened(data, image="jpg", label="cls", class_names=NAMES)
    assert task.score(build.params()) == 1.0
    renamed = opened(build.write_data(tmp_path / "e", pictures, right, classes=NAMES), class_names=NAMES[::-1])
    assert renamed.score(build.params()) == 1.0  # names are given by label


def test_images_are_decoded_by_threads_and_not_all_at_once(folder, small_batches, monkeypatch):
    names, begun = [], []
    prepare, ahead = clip_tasks.Preprocessor.__call__, clip_tasks.computed_ahead

    def preparing(self, image):
        names.append(threading.current_thread().name)
        return prepare(self, image)

    def beginning(work, jobs, **options):
        return ahead(work, (begun.append(job) or job for job in jobs), **options)

    monkeypatch.setattr(clip_tasks.Preprocessor, "__call__", preparing)
    monkeypatch.setattr(clip_tasks, "computed_ahead", beginning)
    seen = []
    opened(folder).score(build.params(), on_batch=lambda *_: seen.append(len(begun)))
    assert len(names) == N
    assert all(name.startswith("nufilt-ahead") for name in names)
    assert seen[0] == 8 * 4  # the batch told of, the next one on the device, two ahead


@pytest.mark.parametrize("broken", [b"\x89PNG\r\n\x1a\nnonsense", None], ids=["bytes", "none"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, pictures, right, broken, small_batches, monkeypatch):
    png = build.png
    monkeypatch.setattr(build, "png", lambda image: png(image) if image != "bad" else {"bytes": broken, "path": None})
    bad = "bad" if broken else None
    data = build.write_data(tmp_path / "d", [*pictures[:20], bad, *pictures[21:]], right, classes=NAMES)
    task = opened(data)
    with pytest.raises(ConfigError, match=f"task mine: data set {data}: the image of row 20 cannot be read: "):
        task.score(build.params())
    assert opened(data, limit=3).score(build.params()) >= 0  # it is not among them
    limited = opened(data, limit=20)  # rows 0, 1, 3, 5 ...
    row = next(index * N // 20 for index in range(20) if index * N // 20 >= 20)
    assert row == 20
    with pytest.raises(ConfigError, match="the image of row 20 cannot be read"):
        limited.score(build.params())


def test_labels_that_are_no_class_are_named(tmp_path, pictures, right):
    for wrong in (N_CLASSES, -1, None):
        data = build.write_data(tmp_path / str(wrong), pictures, [*right[:9], wrong, *right[10:]], classes=None)
        shown = -1 if wrong is None else wrong
        with pytest.raises(ConfigError, match=f"the label of row 9 is {shown}, and there are 9 classes"):
            opened(data, class_names=NAMES).score(build.params())


def test_what_does_not_fit_is_refused_before_any_image_is_read(tmp_path, folder, pictures, right, monkeypatch):
    monkeypatch.setattr(clip_tasks._ImageTask, "score", None)

    def refusal(data=folder, error=ConfigError, **changes):
        with pytest.raises(error) as caught:
            opened(data, **changes)
        return str(caught.value)

    where = f"task mine: data set {folder}: "
    there = "image, label"
    assert refusal(image="img", label="y").splitlines() == [
        f"{where}there is no column 'img' but {there}",
        f"{where}there is no column 'y' but {there}",
    ]
    assert refusal(image="label", label="image").splitlines() == [
        f"{where}column 'label' holds int64, not images",
        f"{where}column 'image' holds PIL.Image.Image, not whole numbers",
        f"{where}column 'image' has no class names: give the task's class_names",
    ]
    assert f"{where}column 'label' has 9 classes, the task 2 class_names" in refusal(class_names=("a", "b"))
    numbers = build.write_data(tmp_path / "numbers", pictures[:3], right[:3], classes=None)
    assert "column 'label' has no class names" in refusal(numbers)
    empty = build.write_data(tmp_path / "empty", [], [])
    assert "split 'test' is empty" in refusal(empty)
    assert refusal(limit=0) == "limit: must be at least 1, got 0"
    assert "there is no split 'train'" in refusal(split="train")
    assert "config.json asks for 12 by 12" in refusal(error=CheckpointError, preprocessor_config={})
    assert "model_type is 't5'" in refusal(error=CheckpointError, model_config={"model_type": "t5"})
    monkeypatch.setattr(clip_tasks.importlib.util, "find_spec", lambda name: None)
    assert "Pillow, which is not installed (pip install 'nufilt_jax[eval]')" in refusal(error=MissingExtraError)


SPLIT_OVER_DEVICES = """
import json, sys, jax, numpy as np
sys.path[:0] = json.loads(sys.argv[1])
import image_models as build, test_clip_tasks as tests
from safetensors.numpy import load_file
from nufilt_jax.evaluation import scoring
scoring._BATCH = 7  # rounded up to 9
assert jax.local_device_count() == 3
task = tests.opened(sys.argv[2])
classifier = scoring.Classifier(build.params(), build.CONFIG)
images = classifier._arranged(np.zeros((2, 3, 12, 12), np.uint8), np.zeros(2, np.int64))
assert [len(shard.data) for shard in jax.device_put(images[0], images[2]).addressable_shards] == [3, 3, 3]
mixture = load_file(sys.argv[3])
scores = [task.score(build.params()), *(tests.opened(sys.argv[2], limit=n).score(mixture) for n in (36, 37))]
print(json.dumps([classifier.batch_size, scoring.Classifier(mixture, build.CONFIG).batch_size, *scores]))
"""


def test_batches_are_split_over_devices(folder, right, labels, tmp_path):
    """Also of models with experts, whose last batch may not be filled: 36 images go on 3 devices, 37 on each."""
    mlp, rng = "vision_model.encoder.layers.0.mlp", np.random.default_rng(5)
    shapes = {f"{mlp}.gate.weight": (2, 8), f"{mlp}.gate.bias": (2,)}
    for part, (m, n) in {"fc1": (10, 8), "fc2": (8, 10)}.items():
        shapes |= {f"{mlp}.{part}.experts.{i}.{k}": s for i in range(2) for k, s in (("a", (3, n)), ("b", (m, 3)))}
    mixture = build.params() | {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(mixture, tmp_path / "mixture.safetensors")
    paths = json.dumps([path for path in sys.path if path])
    command = [sys.executable, "-c", SPLIT_OVER_DEVICES, paths, str(folder), str(tmp_path / "mixture.safetensors")]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    wanted = sum(a == b for a, b in zip(right, labels, strict=True)) / N
    mixed = [opened(folder, limit=n).score(mixture) for n in (36, 37)]
    assert json.loads(run.stdout) == pytest.approx([9, 128, wanted, *mixed])
