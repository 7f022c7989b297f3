"""The images of tasks without their answers: what is needed to see what a layer is given."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from nufilt_jax.errors import ConfigError, Problem, error_of, gathering
from nufilt_jax.evaluation.clip.tasks import open_image_task
from nufilt_jax.evaluation.specs import ImageSpec, Spec


class TaskImages(NamedTuple):
    """Images of one task.

    Attributes:
      images: as the model's preprocessor crops them.
      mean: per channel, subtracted after a division by 255.
      std: per channel, divides after that.
    """

    images: UInt8[np.ndarray, "n 3 h w"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_task_images(
    names: Sequence[str],
    specs: Mapping[str, Spec],
    *,
    model_config: Mapping[str, Any],
    preprocessor_config: Mapping[str, Any],
    limit: int,
) -> list[TaskImages]:
    """Reads the images of data sets.

    Args:
      names: of tasks.
      specs: of all tasks known, by name.
      model_config: `config.json` of the models.
      preprocessor_config: `preprocessor_config.json` of the same folder.
      limit: at most so many images of each task, evenly spread.

    Raises:
      NufiltError: with every task that is not known, whose data set cannot be had, or that does not fit.
    """
    problems, ready = [], []
    for name in names:
        with gathering(problems):
            spec = specs.get(name)
            if not isinstance(spec, ImageSpec):
                raise ConfigError(Problem(f"task {name}", "no data set of images is known", "see --tasks-file"))
            how: dict[str, Any] = {"model_config": model_config, "preprocessor_config": preprocessor_config}
            ready.append(open_image_task(spec, name, head=_NoHead(), limit=limit, **how))
    if problems:
        raise error_of(problems)
    return [TaskImages(task.pixels(), task.preprocessor.mean, task.preprocessor.std) for task in ready]


class _NoHead:
    """Stands where a head is made, and makes none: nothing is scored here."""

    visual_projection = None

    def __call__(self, class_names: Sequence[str], templates: Sequence[str]) -> Float[np.ndarray, "c d"]:
        raise TypeError("images are read without a head")
