"""The paper's models and task groups as data: Hub ids, orders, and settings that depend on the group."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from nufilt_jax.config import problem
from nufilt_jax.errors import ConfigError, NotYetError, raise_all

T = TypeVar("T")

# The twenty tasks by their ID, 1 to 20 (Table 6, arXiv:2509.21413v2), as the checkpoints' names end.
TASKS = (
    *("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"),
    *("oxford_flowers102", "pcam", "fer2013", "oxford-iiit-pet", "stl10", "cifar100"),
    *("cifar10", "food101", "fashion_mnist", "emnist_letters", "kmnist", "rendered-sst2"),
)
GROUPS = (8, 14, 20)
CLIP_BASES = {
    "vit-b32": "openai/clip-vit-base-patch32",
    "vit-b16": "openai/clip-vit-base-patch16",
    "vit-l14": "openai/clip-vit-large-patch14",
}
TINY = "tiny"
NOT_YET = ("flan-t5-base", "llava-1.5-7b")
MODELS = (TINY, *CLIP_BASES, *NOT_YET)

# r_p, r_l and r_v of Table 9 are for widths of 768 and more; the built-in tower is narrower. Chosen on the
# validation draw of its tasks, see benchmarks/results/tiny_ranks.json.
TINY_CONFIG: dict[str, dict[str, Any]] = {
    "nufilt": {"filter_rank": 32, "adapter_rank": 24, "task_rank": 32},
    "null_space": {"filter_rank": 24},
}


class Preset(NamedTuple):
    """A base and its tasks, in the order in which they are merged.

    Attributes:
      base: source of the backbone.
      tasks: (name, source) pairs.
      settings: method settings, by method, that differ from the defaults.
    """

    base: str
    tasks: tuple[tuple[str, str], ...]
    settings: dict[str, dict[str, Any]]


def clip_preset(model: str, group: int | None, order: int | None) -> Preset:
    """One of the paper's CLIP streams.

    Args:
      model: one of `CLIP_BASES`.
      group: 8, 14 or 20 tasks; None for 8.
      order: 1 to 10, the paper's orders; 0 for the order of the IDs; None for 1.

    Raises:
      ConfigError: there is no such group or order.

    >>> [name for name, _ in clip_preset("vit-b32", 8, 1).tasks][:3]
    ['eurosat', 'svhn', 'mnist']
    """
    size = GROUPS[0] if group is None else group
    problems = []
    if size not in GROUPS:
        problems.append(problem("group", f"{size} is no task group", f"choose from {', '.join(map(str, GROUPS))}"))
    if order is not None and not 0 <= order <= 10:
        problems.append(problem("order", f"the paper has orders 1 to 10, got {order}", "or say --order given"))
    raise_all(ConfigError, problems)
    base = CLIP_BASES[model]
    stem = base.removeprefix("openai/")
    tasks = [(name, f"tanganke/{stem}_{name}") for name in TASKS[:size]]
    scale = {8: 0.3, 14: 0.1, 20: 0.1}[size]  # Table 9
    return Preset(base, shuffled(tasks, 1 if order is None else order), {"task_arithmetic": {"scale": scale}})


def shuffled(tasks: Sequence[T], order: int) -> tuple[T, ...]:
    """The paper's k-th order of a list: Python's own generator seeded with 41 + k (Table 6); 0 leaves it as given."""
    result = list(tasks)
    if order:
        random.Random(41 + order).shuffle(result)
    return tuple(result)


def check_model(model: str) -> None:
    """Refuses a name that is no preset.

    Raises:
      ConfigError: the name is unknown.
      NotYetError: it is a preset to come.
    """
    if model not in MODELS:
        raise ConfigError(problem("model", f"unknown model {model!r}", f"choose from {', '.join(MODELS)}"))
    if model in NOT_YET:
        ready = ", ".join(m for m in MODELS if m not in NOT_YET)
        raise NotYetError(
            problem("model", f"{model} is not ready yet", f"choose from {ready}, or give --base and --task")
        )
