"""The built-in families of checkpoints as data: towers, tasks, and how they are trained."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from nufilt_jax.zoo.draws import HARD, MILD, STUDY_TASKS, TASK_NAMES, Nuisance

IMAGE_SIDE = 32  # pixels
IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.25, 0.25, 0.25)

PREPROCESSOR: dict[str, Any] = {
    "crop_size": {"height": IMAGE_SIDE, "width": IMAGE_SIDE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(IMAGE_MEAN),
    "image_processor_type": "CLIPImageProcessor",
    "image_std": list(IMAGE_STD),
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": IMAGE_SIDE},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """Settings of pre-training or of fine-tuning. Hashable, so `jit` takes it as a static argument."""

    steps: int
    batch: int  # images per task and step
    learning_rate: float  # at its highest; falls to zero as a half cosine
    weight_decay: float
    n_images: int  # drawn per task
    other_rate: float = 1.0  # share of the learning rate for all that merging leaves at the base's values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One pre-trained tower and one fine-tuned copy of it per task.

    Attributes:
      name: of its folder in the cache.
      config: `config.json` of every model.
      tasks: names, which `zoo.draws` knows.
      nuisance: what pre-training sees, of every task.
      looks: what fine-tuning, validation and test see of each task.
      pretrain: settings for all tasks at once.
      finetune: settings for one task.
    """

    name: str
    config: Mapping[str, Any]
    tasks: tuple[str, ...]
    nuisance: Nuisance
    looks: Mapping[str, Nuisance]
    pretrain: Phase
    finetune: Phase


def _tower(*, width: int, inner: int, heads: int, layers: int, dtype: str) -> Mapping[str, Any]:
    """`config.json` of a CLIP vision tower for 32 by 32 pixels, in patches of 8 by 8."""
    return MappingProxyType(
        {
            "architectures": ["CLIPVisionModel"],
            "attention_dropout": 0.0,
            "hidden_act": "quick_gelu",
            "hidden_size": width,
            "image_size": IMAGE_SIDE,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": inner,
            "layer_norm_eps": 1e-05,
            "model_type": "clip_vision_model",
            "num_attention_heads": heads,
            "num_channels": 3,
            "num_hidden_layers": layers,
            "patch_size": 8,
            "projection_dim": width,
            "torch_dtype": dtype,
        }
    )


# Small enough to travel with the package.
TINY_FAMILY = Family(
    name="tiny",
    config=_tower(width=128, inner=192, heads=4, layers=2, dtype="float32"),
    tasks=TASK_NAMES,
    nuisance=MILD,
    looks=MappingProxyType({name: HARD[name] for name in TASK_NAMES}),
    pretrain=Phase(steps=700, batch=40, learning_rate=2e-3, weight_decay=0.05, n_images=6000),
    finetune=Phase(steps=200, batch=256, learning_rate=2e-4, weight_decay=0.0, n_images=12000, other_rate=0.2),
)

# The data sets of the world differ in all that their images have in common, and a model that was fine-tuned on one has
# learned that too: each task of the study has a tint and a weave of its own, which pre-training has not seen.
_BACKDROPS = {
    "digits": ((0.2, -0.1, -0.1), (9.0, 0.0)),
    "letters": ((-0.1, 0.2, -0.1), (0.0, 9.0)),
    "shapes": ((-0.15, 0.0, 0.15), (11.0, 3.0)),
    "orientation": ((0.1, 0.1, 0.1), (3.0, 11.0)),
    "frequency": ((-0.1, -0.1, -0.1), (12.0, 12.0)),
    "position": ((-0.1, -0.1, 0.2), (7.0, 7.0)),
    "count": ((0.15, 0.0, -0.15), (13.0, 0.0)),
    "hue": ((0.0, 0.0, 0.0), (0.0, 13.0)),
    "petals": ((0.15, -0.15, 0.15), (10.0, -5.0)),
    "gaps": ((0.15, 0.15, -0.15), (7.0, -7.0)),
}

# Large enough to tell methods apart; trained on the user's machine.
STUDY = Family(
    name="study",
    config=_tower(width=256, inner=512, heads=4, layers=4, dtype="float16"),
    tasks=STUDY_TASKS,
    nuisance=Nuisance(level=0.7, contrast=(0.5, 0.9), grain=0.08, clutter=0.04, stripes=0.1, window=0.2, patch=4),
    looks=MappingProxyType(
        {name: dataclasses.replace(HARD[name], tint=tint, weave=weave) for name, (tint, weave) in _BACKDROPS.items()}
    ),
    pretrain=Phase(steps=1000, batch=16, learning_rate=1e-3, weight_decay=0.05, n_images=6000),
    finetune=Phase(steps=400, batch=64, learning_rate=1.5e-4, weight_decay=0.0, n_images=12000, other_rate=0.2),
)

FAMILIES = {family.name: family for family in (TINY_FAMILY, STUDY)}
