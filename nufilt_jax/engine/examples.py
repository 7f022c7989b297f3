"""Unlabelled examples of the tasks, for the methods that learn from them: NAME.safetensors in the folder of --data.

For CLIP a file holds `pixel_values` [n, 3, h, w], as the model's preprocessor makes them, `prototypes` [classes, d],
the classes' text embeddings of unit length, and may hold `labels` [n], which serve to draw equally from every class and
for nothing else. For T5 it holds `input_ids` and `attention_mask`, both [n, tokens].
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import load_file, save_file

from nufilt_jax.checkpoints import Checkpoint
from nufilt_jax.checkpoints.dtypes import FLOATS
from nufilt_jax.checkpoints.safetensors_files import Entry, read_header
from nufilt_jax.config import problem
from nufilt_jax.durable import make_folder, replacing
from nufilt_jax.errors import CheckpointError, NotYetError, Problem, gathering, of_kind
from nufilt_jax.evaluation import Task
from nufilt_jax.evaluation.learning_data import clip_task_data, t5_task_data
from nufilt_jax.methods import TaskData
from nufilt_jax.methods.adaptation import LearningConfig
from nufilt_jax.models.clip_config import parse_vision_config
from nufilt_jax.models.clip_names import tower_problems
from nufilt_jax.models.t5_config import parse_t5_config
from nufilt_jax.models.t5_names import t5_problems

T = TypeVar("T")

_IMAGES = {"pixel_values": "[n, 3, h, w]", "prototypes": "[classes, d]"}
_TEXTS = {"input_ids": "[n, tokens]", "attention_mask": "[n, tokens]"}


def example_files(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """The file of each task."""
    return {name: folder / f"{name}.safetensors" for name in names}


def forward_problems(base: Checkpoint) -> list[Problem]:
    """What keeps the model's forward pass from running, from its config and headers alone.

    Raises:
      NotYetError: no forward pass is known for this model.
    """
    is_clip, found = _wanted(base) is _IMAGES, list[Problem]()
    # As the methods have them: what holds no floating numbers is no parameter.
    given = {name: info.shape for name, info in base.tensors.items() if info.dtype in FLOATS}
    with gathering(found):
        if is_clip:
            vision = _parsed(base, parse_vision_config)
            unfit = tower_problems(given, vision, whole_model=base.config["model_type"] == "clip")
        else:
            unfit = t5_problems(given, _parsed(base, parse_t5_config))
        found += of_kind(CheckpointError, (_of_model(problem, base) for problem in unfit))
    return found


def _parsed(base: Checkpoint, parse: Callable[[Mapping[str, Any]], T]) -> T:
    """The numbers of the model; what is wrong with them is told with the file's path."""
    try:
        return parse(base.config)
    except CheckpointError as error:
        raise CheckpointError(*(p._replace(where=str(base.path / p.where)) for p in error.problems)) from error


def _of_model(problem: Problem, base: Checkpoint) -> Problem:
    """The same, with the file and the name in it."""
    fix = "choose a data-free method"
    if problem.tensor not in base.tensors:
        return Problem(base.source, "is missing, and the model's forward pass needs it", fix, problem.tensor)
    info = base.tensors[problem.tensor]
    return Problem(str(info.file), problem.what, fix, info.stored_name)


def example_problems(files: Mapping[str, Path], base: Checkpoint) -> Iterator[Problem]:
    """What keeps the files from being used, from their headers alone.

    Raises:
      NotYetError: no forward pass is known for this model.
    """
    wanted = _wanted(base)
    for name, path in files.items():
        if not path.is_file():
            yield Problem(str(path), f"is missing: the method learns from examples of {name}", "see --data")
            continue
        with path.open("rb") as file:
            header = read_header(file, str(path))
        yield from header.problems
        if not header.problems:
            entries = {entry.name: entry for entry in header.entries}
            yield from _faults(str(path), entries, wanted, base)


def _wanted(base: Checkpoint) -> Mapping[str, str]:
    """The tensors of a file, with their axes, by the kind of model."""
    kind = base.config.get("model_type")
    if kind in ("clip", "clip_vision_model"):
        return _IMAGES
    if kind == "t5":
        return _TEXTS
    raise NotYetError(problem("method", f"{kind!r} models have no forward pass here", "choose a data-free method"))


def _faults(path: str, entries: Mapping[str, Entry], wanted: Mapping[str, str], base: Checkpoint) -> Iterator[Problem]:
    for name, axes in wanted.items():
        if name not in entries:
            yield Problem(path, f"is missing, and should be {axes}", "see --data", name)
        elif len(shape := entries[name].shape) != axes.count(",") + 1 or 0 in shape:
            yield Problem(path, f"has shape {list(shape)}, and should be {axes}", "see --data", name)
    if wanted is _IMAGES and entries.keys() >= wanted.keys():
        yield from _image_faults(path, entries, base)


def _image_faults(path: str, entries: Mapping[str, Entry], base: Checkpoint) -> Iterator[Problem]:
    config = _parsed(base, parse_vision_config)
    images, heads = entries["pixel_values"].shape, entries["prototypes"].shape
    side = config.image_size
    if images[1:] != (config.num_channels, side, side):
        what = f"has shape {list(images)}, but the model takes [n, {config.num_channels}, {side}, {side}]"
        yield Problem(path, what, "use the model's preprocessor", "pixel_values")
    projection = base.tensors.get("visual_projection.weight")
    width = projection.shape[0] if projection is not None and projection.shape else config.hidden_size
    if heads[-1] != width:
        what = f"has shape {list(heads)}, but the model's features have {width} dimensions"
        yield Problem(path, what, "use the model's own text tower", "prototypes")
    if "labels" in entries and entries["labels"].shape != images[:1]:
        what = f"has shape {list(entries['labels'].shape)}, but there are {images[0]} images"
        yield Problem(path, what, "", "labels")


def load_examples(path: Path, base: Mapping[str, Any], config: LearningConfig, seed: int) -> TaskData:
    """The batches that a method takes from one file, drawn by `seed`.

    Args:
      path: a file that `example_problems` has nothing against.
      base: the backbone's `config.json`.
      config: of the method.
      seed: of the draw.
    """
    arrays = load_file(path)
    draw = {"steps": config.steps, "batch_size": config.batch_size, "seed": seed}
    if "pixel_values" in arrays:
        images, head, labels = arrays["pixel_values"], arrays["prototypes"], arrays.get("labels")
        per_class = config.examples_per_class
        return TaskData(*clip_task_data(images, head, labels, base, examples_per_class=per_class, **draw))
    return TaskData(*t5_task_data(arrays["input_ids"], arrays["attention_mask"], base, **draw))


def drawing_seed(seed: int, step: int, task: str) -> int:
    """From a merge's seed, the step and the task's name alone, so that a resumed merge draws the same."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{step}\0{task}\0examples".encode()).digest()[:8], "little")


def write_examples(folder: Path, tasks: Iterable[Task]) -> Path:
    """Writes evaluation tasks as files of examples, their images as the model takes them."""
    make_folder(folder)
    for task in tasks:
        arrays = {"pixel_values": pixels(task), "prototypes": task.head, "labels": task.labels}
        with replacing(folder / f"{task.name}.safetensors") as draft:
            save_file(arrays, draft)
    return folder


def pixels(task: Task) -> np.ndarray:
    """A task's images in float32, normalised."""
    if task.images.dtype != np.uint8:
        return task.images
    mean, std = (np.array(x, np.float32)[None, :, None, None] for x in (task.mean, task.std))
    return (task.images.astype(np.float32) / 255 - mean) / std
