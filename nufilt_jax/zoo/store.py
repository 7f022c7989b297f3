"""The built-in checkpoints as ordinary Hugging Face folders, written once into a per-user cache."""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import numpy as safetensors

from nufilt_jax.durable import atomic_write, make_folder, sync, sync_tree
from nufilt_jax.errors import CheckpointError, ConfigError, OutputError, Problem
from nufilt_jax.evaluation import Task
from nufilt_jax.user_cache import user_cache
from nufilt_jax.zoo.draws import CLASS_NAMES, TASK_NAMES, Split, draw
from nufilt_jax.zoo.families import IMAGE_MEAN, IMAGE_STD, PREPROCESSOR, TINY_FAMILY, Family

_HEADS = "heads.safetensors"
N_IMAGES = 500  # drawn per task


@dataclasses.dataclass(frozen=True)
class TinyZoo:
    """Where the built-in checkpoints stand, and what they are evaluated on.

    Attributes:
      folder: holds everything below, and the tasks' heads.
      base: folder of the pre-trained model.
      tasks: folder of each fine-tuned model, by task name, in the order of `TASK_NAMES`.
    """

    folder: Path
    base: Path
    tasks: Mapping[str, Path]

    def evaluation_tasks(
        self, names: tuple[str, ...] = TASK_NAMES, *, n_images: int = N_IMAGES, split: Split = "test"
    ) -> tuple[Task, ...]:
        """The tasks' images with their zero-shot heads; see `evaluation_tasks`."""
        return evaluation_tasks(names, n_images=n_images, split=split)


def evaluation_tasks(
    names: tuple[str, ...] = TASK_NAMES,
    *,
    n_images: int = N_IMAGES,
    split: Split = "test",
    family: Family = TINY_FAMILY,
    heads: Mapping[str, Float[np.ndarray, "c d"]] | None = None,
) -> tuple[Task, ...]:
    """Draws the images of the built-in tasks. The models have never seen the test split's.

    Args:
      names: which tasks, in which order.
      n_images: per task. `digits` has 500 handwritten originals to test on; beyond that they come again,
        in another place and colour.
      split: "test" for scores that are reported, "val" for choices such as ranks.
      family: whose looks and heads they have.
      heads: class embeddings by task; by default those that are stored with the family.

    Returns:
      One task per name; the same arguments give the same bits.

    Raises:
      ConfigError: there is no such task.
      MissingExtraError: `digits` needs scikit-learn.
    """
    heads = load_heads(family) if heads is None else heads
    tasks: list[Task] = []
    for name in names:
        images, labels = draw(name, split, n_images, family.looks[name])
        tasks.append(
            Task(
                name=name,
                images=images,
                labels=labels,
                head=heads[name],
                class_names=CLASS_NAMES[name],
                mean=IMAGE_MEAN,
                std=IMAGE_STD,
            )
        )
    return tuple(tasks)


def weights_folder(family: Family) -> Path:
    """Where a family's weights are kept: `TINY_FAMILY`'s come with the package, others are made in the user's cache."""
    if family is TINY_FAMILY:
        return Path(str(resources.files("nufilt_jax.zoo"))) / "weights"
    return family_folder(family) / "weights"


def load_heads(family: Family = TINY_FAMILY) -> dict[str, Float[np.ndarray, "c d"]]:
    """The frozen class embeddings of every task, of unit length.

    Raises:
      CheckpointError: the family has not been made yet.
    """
    return _load(family, _HEADS)


def load_params(name: str, family: Family = TINY_FAMILY) -> dict[str, Float[np.ndarray, "..."]]:
    """The weights of "base" or of one task's model: float32, exactly the stored float16 numbers.

    Raises:
      ConfigError: there is no such model.
      CheckpointError: the family has not been made yet.
    """
    if name not in ("base", *family.tasks):
        fix = f"one of base, {', '.join(family.tasks)}"
        raise ConfigError(Problem("model", f"no built-in model {name!r}", fix))
    stored = _load(family, f"{name}.safetensors")
    return {key: value.astype(np.float32) for key, value in stored.items()}


def _load(family: Family, file: str) -> dict[str, np.ndarray]:
    path = weights_folder(family) / file
    if not path.is_file():
        fix = f"run python -m nufilt_jax.zoo.train {family.name}"
        raise CheckpointError(Problem(str(path), "is missing", fix))
    return safetensors.load(path.read_bytes())


def materialise(folder: Path | str | None = None) -> TinyZoo:
    """Writes the built-in checkpoints as ordinary Hugging Face folders, unless they are there.

    A new folder appears whole, by renaming. In a folder that exists, every file that is missing or
    different is replaced, one by one, also by renaming. Two processes may do this at the same time: both
    write the same.

    Args:
      folder: where; by default `default_folder()`.

    Returns:
      The paths of the base model and of the tasks' models.

    Raises:
      OutputError: the folder cannot be written.
    """
    target = Path(folder) if folder is not None else family_folder()
    files = _contents()
    try:
        if not target.exists():
            _create(target, files)
        _repair(target, files)  # also after another process has won the race to create it
    except OSError as error:
        what = f"the built-in checkpoints cannot be written: {error.strerror or error}"
        raise OutputError(Problem(str(target), what, "choose another folder, by NUFILT_CACHE for instance")) from error
    tasks = {name: target / "tasks" / name for name in TASK_NAMES}
    return TinyZoo(target, target / "base", MappingProxyType(tasks))


def family_folder(family: Family = TINY_FAMILY) -> Path:
    """A family's folder in this user's cache; see `user_cache`.

    Raises:
      ConfigError: this user has no home folder.
    """
    cache = user_cache()
    if cache is None:
        raise ConfigError(
            Problem("NUFILT_CACHE", "is not set, and this user has no home folder", "name a folder by it")
        )
    return cache / family.name


def _contents() -> dict[str, bytes]:
    """Every file of the folder, by its relative path."""
    places = {"base": "base", **{name: f"tasks/{name}" for name in TASK_NAMES}}
    files: dict[str, bytes] = {}
    for name, place in places.items():
        files[f"{place}/config.json"] = _json(dict(TINY_FAMILY.config))
        files[f"{place}/preprocessor_config.json"] = _json(PREPROCESSOR)
        files[f"{place}/model.safetensors"] = safetensors.save(load_params(name), {"format": "pt"})
    files[_HEADS] = safetensors.save(load_heads())
    files["heads.json"] = _json({name: list(CLASS_NAMES[name]) for name in TASK_NAMES})
    return files


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def _create(target: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder beside `target` and renames it, unless another process has been faster."""
    make_folder(target.parent)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name, content in files.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_bytes(content)
        draft.chmod(0o755)  # mkdtemp's is 0o700: a cache shared by several users could not be read
        sync_tree(draft)
        try:
            draft.rename(target)
        except OSError:
            if not target.exists():
                raise
        sync(target.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _repair(target: Path, files: Mapping[str, bytes]) -> None:
    """Replaces each file that is missing or different."""
    for name, content in files.items():
        path = target / name
        if path.is_file() and path.read_bytes() == content:
            continue
        make_folder(path.parent)
        atomic_write(path, content)
