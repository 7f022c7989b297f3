"""Accuracy on image data sets: decoded by threads ahead of the device, scored by one compiled program."""

import dataclasses
import functools
import importlib.util
import itertools
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int, UInt8

from nufilt_jax.config import ComputeType
from nufilt_jax.errors import ConfigError, MissingExtraError, Problem, raise_all
from nufilt_jax.evaluation.clip.heads import HeadMaker
from nufilt_jax.evaluation.clip.preprocess import Preprocessor, parse_preprocessor
from nufilt_jax.evaluation.data_sets import DataSet, open_data_set
from nufilt_jax.evaluation.prefetch import computed_ahead
from nufilt_jax.evaluation.ready import OnBatch, evenly_spread
from nufilt_jax.evaluation.scoring import Classifier
from nufilt_jax.evaluation.specs import ImageSpec
from nufilt_jax.models.clip_config import parse_vision_config

if TYPE_CHECKING:
    import datasets

_BATCHES_AHEAD = 2  # decoded or under way while the device computes
_AT_ONCE = 64  # where all images are read, so many are decoded together
_PROJECTION = "visual_projection.weight"


def open_image_task(
    spec: ImageSpec,
    name: str,
    *,
    model_config: Mapping[str, Any],
    preprocessor_config: Mapping[str, Any],
    head: HeadMaker,
    limit: int | None = None,
    offline: bool = False,
    dtype: ComputeType = "float32",
) -> "_ImageTask":
    """Finds a task's data set and checks what can be known without its images.

    Models without a projection, as the fine-tuned vision towers are, are scored behind that of `head`.

    Args:
      spec: the task.
      name: key of its score.
      model_config: `config.json` of the models to come, or of their base.
      preprocessor_config: `preprocessor_config.json` of the same folder.
      head: makes the zero-shot head, at the first score; see `TextHeads`.
      limit: at most so many examples, evenly spread over the split, for a quick look; None for all.
      offline: use what is on this machine and nothing else.
      dtype: in which the forward pass computes; layer norms and softmax stay in float32.

    Raises:
      CheckpointError: the model's or the preprocessor's config cannot be used.
      ConfigError: the data set cannot be had, or does not fit the task.
      MissingExtraError: `datasets` or Pillow is not installed.
    """
    where = f"task {name}"
    preprocessor = parse_preprocessor(preprocessor_config, image_size=parse_vision_config(model_config).image_size)
    if limit is not None and limit < 1:
        raise ConfigError(Problem("limit", f"must be at least 1, got {limit}"))
    if importlib.util.find_spec("PIL") is None:
        what = "reading images needs Pillow, which is not installed"
        raise MissingExtraError(Problem(where, what, "pip install 'nufilt_jax[eval]'"))
    source = {"split": spec.split, "config": spec.config, "revision": spec.revision}
    data = open_data_set(spec.dataset, **source, where=where, offline=offline)
    class_names, faults = _class_names(spec, data)
    raise_all(ConfigError, (Problem(f"{where}: data set {spec.dataset}", what) for what in faults))
    return _ImageTask(
        name=name,
        n_examples=len(evenly_spread(data.n_rows, limit)),
        spec=spec,
        data=data,
        class_names=class_names,
        preprocessor=preprocessor,
        model_config=model_config,
        head=head,
        dtype=dtype,
    )


def _class_names(spec: ImageSpec, data: DataSet) -> tuple[tuple[str, ...], list[str]]:
    """The task's class names, and what the data set has against the task."""
    import datasets

    there = ", ".join(data.columns)
    faults = [f"there is no column {key!r} but {there}" for key in (spec.image, spec.label) if key not in data.columns]
    if not data.n_rows:
        faults.append(f"split {spec.split!r} is empty")
    if faults:
        return (), faults
    image, label = data.columns[spec.image], data.columns[spec.label]
    if not isinstance(image, datasets.Image):
        faults.append(f"column {spec.image!r} holds {_kind(image)}, not images")
    own = tuple(label.names) if isinstance(label, datasets.ClassLabel) else None
    if not _kind(label).startswith(("int", "uint", "bool")):
        faults.append(f"column {spec.label!r} holds {_kind(label)}, not whole numbers")
    names = spec.class_names or own or ()
    if not names:
        faults.append(f"column {spec.label!r} has no class names: give the task's class_names")
    elif own is not None and len(own) != len(names):
        faults.append(f"column {spec.label!r} has {len(own)} classes, the task {len(names)} class_names")
    return names, faults


def _kind(feature: object) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _ImageTask:
    """A task whose images are decoded anew for every score; its head is made once. A `ReadyTask`."""

    name: str
    n_examples: int
    spec: ImageSpec
    data: DataSet
    class_names: tuple[str, ...]
    preprocessor: Preprocessor
    model_config: Mapping[str, Any]
    head: HeadMaker
    dtype: ComputeType

    def score(self, params: Mapping[str, ArrayLike], *, on_batch: OnBatch | None = None) -> float:
        """Share of images whose nearest class embedding is the right one; see `ReadyTask`."""
        projection = self.head.visual_projection
        if projection is not None and _PROJECTION not in params:
            params = {**params, _PROJECTION: projection}
        classifier = Classifier(params, self.model_config, dtype=self.dtype)
        how = {"mean": self.preprocessor.mean, "std": self.preprocessor.std, "where": f"task {self.name}"}
        n_right = n_done = 0
        for n_hits in classifier.hits(self._batches(classifier.batch_size), self._embeddings, **how):
            n_right, n_done = n_right + n_hits, min(n_done + classifier.batch_size, self.n_examples)
            if on_batch is not None:
                on_batch(self.name, n_done, self.n_examples)
        return n_right / self.n_examples

    def pixels(self) -> UInt8[np.ndarray, "n 3 h w"]:
        """All images at once, not normalised."""
        return np.concatenate([images for images, _ in self._batches(_AT_ONCE)])

    @functools.cached_property
    def _embeddings(self) -> Float[np.ndarray, "c d"]:
        return self.head(self.class_names, self.spec.templates)

    def _batches(self, size: int) -> Iterator[tuple[UInt8[np.ndarray, "b 3 h w"], Int[np.ndarray, " b"]]]:
        labels = self._labels
        n_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        ahead = _BATCHES_AHEAD * size
        images = computed_ahead(self._pixels, range(self.n_examples), threads=n_threads, ahead=ahead)
        for start in range(0, self.n_examples, size):
            yield np.stack([*itertools.islice(images, size)]), labels[start : start + size]

    @functools.cached_property
    def _rows(self) -> "datasets.Dataset":
        """The examples, images still encoded."""
        import datasets

        rows = self.data.rows().select_columns([self.spec.image, self.spec.label])
        if self.n_examples < len(rows):
            rows = rows.select(self._numbers)
        return rows.cast_column(self.spec.image, datasets.Image(decode=False))

    @functools.cached_property
    def _numbers(self) -> list[int]:
        """Row of the split that each example is."""
        return evenly_spread(self.data.n_rows, self.n_examples)

    @property
    def _labels(self) -> Int[np.ndarray, " n"]:
        labels = np.array([-1 if label is None else int(label) for label in self._rows[self.spec.label]])
        if labels.min() < 0 or labels.max() >= len(self.class_names):
            bad = int(np.flatnonzero((labels < 0) | (labels >= len(self.class_names)))[0])
            what = (
                f"the label of row {self._numbers[bad]} is {labels[bad]}, and there are {len(self.class_names)} classes"
            )
            fix = "take a split whose labels are known, or other class_names"
            raise ConfigError(Problem(f"task {self.name}: data set {self.spec.dataset}", what, fix))
        return labels

    def _pixels(self, index: int) -> UInt8[np.ndarray, "3 h w"]:
        from PIL.Image import DecompressionBombError

        encoded = self._rows[index][self.spec.image]
        try:
            if encoded is None:
                raise ValueError("there is none")
            return self.preprocessor(self.data.columns[self.spec.image].decode_example(encoded))
        except (OSError, ValueError, SyntaxError, DecompressionBombError) as error:
            what = f"the image of row {self._numbers[index]} cannot be read: {error}"
            raise ConfigError(Problem(f"task {self.name}: data set {self.spec.dataset}", what)) from error
