"""The paper's models and task groups as data: Hub ids, orders, and settings that depend on the group."""

import difflib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nufilt_jax.config import problem
from nufilt_jax.errors import ConfigError, raise_all

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
FLAN_T5 = "flan-t5-base"
GLUE_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")  # Table 2's order
LLAVA = "llava-1.5-7b"
MODELS = (TINY, *CLIP_BASES, FLAN_T5, LLAVA)

SettingsByMethod = Mapping[str, Mapping[str, Any]]  # by method, what differs from the defaults

# Table 9, and for knots the authors' settings; 8 tasks take the defaults.
MANY_TASKS: SettingsByMethod = {name: {"scale": 0.1} for name in ("task_arithmetic", "ties", "knots")}

# What the authors' program for Flan-T5 sets, where Table 9 says 1e-4, 50 and 64.
_T5_TRAINING = {"learning_rate": 1e-3, "steps": 100, "batch_size": 8, "entropy": "of_mean"}
FLAN_T5_SETTINGS: SettingsByMethod = {
    "adamerging": _T5_TRAINING,
    "wemoe": _T5_TRAINING | {"first_rank": 32, "later_rank": 32},
}

# What that program does besides, and Table 2 shows: task arithmetic starts anew at every step, TIES leaves out the
# first task, and the token embedding counts under each of its three names.
TABLE_2: SettingsByMethod = {
    "task_arithmetic": {"accumulate": False},
    "ties": {"merge_first": False, "embedding_copies": 3},
    "opcm": {"embedding_copies": 3},
}

# r_p, r_l and r_v of Table 9 are for widths of 768 and more; the built-in tower is narrower. Chosen on the
# validation draw of its tasks, see benchmarks/results/tiny_ranks.json.
TINY_CONFIG: SettingsByMethod = {
    "nufilt": {"filter_rank": 32, "adapter_rank": 24, "task_rank": 32},
    "null_space": {"filter_rank": 24},
}


class Preset(NamedTuple):
    """A base and its tasks, in the order in which they are merged.

    Attributes:
      base: source of the backbone.
      tasks: (name, source) pairs.
      settings: method settings, by method, that differ from the defaults.
      data: folder with examples of each task, for the methods that need them; None if the user has to bring them.
    """

    base: str
    tasks: tuple[tuple[str, str], ...]
    settings: SettingsByMethod
    data: Path | None = None


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
    return Preset(base, shuffled(tasks, 1 if order is None else order), {} if size == GROUPS[0] else MANY_TASKS)


def flan_t5_preset(order: int | None, table: int | None) -> Preset:
    """Flan-T5-base and its eight GLUE tasks.

    Args:
      order: k shuffles the tasks as the paper does its images' tasks; None or 0 for the order of Table 2.
      table: 2 for the settings that reproduce Table 2; None for those that the methods' papers mean.

    Raises:
      ConfigError: no settings are known for that table.

    >>> flan_t5_preset(None, None).tasks[0]
    ('cola', 'tanganke/flan-t5-base_glue-cola')
    """
    if table not in (None, 2):
        raise ConfigError(problem("preset_table", f"must be 2, got {table}", "leave it out for the usual settings"))
    tasks = [(name, f"tanganke/flan-t5-base_glue-{name}") for name in GLUE_TASKS]
    settings = {**FLAN_T5_SETTINGS, **(TABLE_2 if table == 2 else {})}
    return Preset("google/flan-t5-base", shuffled(tasks, order or 0), settings)


def llava_preset(tasks: Sequence[tuple[str, str]], order: int | None) -> Preset:
    """LLaVA 1.5 of 7 B parameters, and the user's tasks: the authors of Table 3 have published none of theirs.

    Args:
      tasks: (name, source) pairs, as given.
      order: k shuffles them as the paper does its images' tasks; None or 0 for the order given.
    """
    return Preset("llava-hf/llava-1.5-7b-hf", shuffled(tasks, order or 0), {})


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
    """
    if model not in MODELS:
        near = difflib.get_close_matches(model, MODELS, 1, 0.5)
        fix = (f"did you mean {near[0]}? " if near else "") + f"choose from {', '.join(MODELS)}"
        raise ConfigError(problem("model", f"unknown model {model!r}", fix))
