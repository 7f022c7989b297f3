"""The numbers of a CLIP vision tower, as its `config.json` states them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast

from nufilt_jax.errors import CheckpointError, Problem, raise_all

Activation = Literal["quick_gelu", "gelu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipVisionConfig:
    """Shape of a CLIP vision tower. Hashable, so `jit` takes it as a static argument.

    The defaults are those of transformers' `CLIPVisionConfig`, which leaves a value out of `config.json`
    where it equals its default.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels, height and width
    patch_size: int = 32  # pixels, height and width
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def num_positions(self) -> int:
        """Tokens of one image: its whole patches, and the class token before them."""
        return (self.image_size // self.patch_size) ** 2 + 1


def parse_vision_config(config: Mapping[str, Any]) -> ClipVisionConfig:
    """Reads the vision tower's numbers out of a `config.json`.

    Args:
      config: of a CLIP vision model (`model_type` "clip_vision_model"), or of a whole CLIP model ("clip"),
        whose vision tower stands under `vision_config`.

    Returns:
      The tower's shape; what the file leaves out has transformers' default.

    Raises:
      CheckpointError: it is another kind of model, or a value has the wrong type or is out of range.
    """
    model_type = config.get("model_type")
    if model_type not in ("clip", "clip_vision_model"):
        raise CheckpointError(
            Problem(
                "config.json",
                f"model_type is {model_type!r}, not 'clip' or 'clip_vision_model'",
                "use the config.json of a CLIP model",
            )
        )
    vision = config.get("vision_config") if model_type == "clip" else config
    if not isinstance(vision, Mapping):
        raise CheckpointError(Problem("config.json", f"vision_config is {vision!r}, not an object"))
    vision = cast(Mapping[str, Any], vision)
    fields = dataclasses.fields(ClipVisionConfig)
    values = {field.name: vision.get(field.name, field.default) for field in fields}
    raise_all(CheckpointError, _problems(values))
    return ClipVisionConfig(**values)


def _problems(values: Mapping[str, Any]) -> list[Problem]:
    """Everything that is wrong with the values of one config."""
    found: list[str] = []
    for name, value in values.items():
        if name == "hidden_act":
            if value not in ("quick_gelu", "gelu"):
                found.append(f"hidden_act is {value!r}, not 'quick_gelu' or 'gelu'")
        elif name == "layer_norm_eps":
            if not isinstance(value, float) or not 0 < value < 1:
                found.append(f"layer_norm_eps is {value!r}, not a number between 0 and 1")
        elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found.append(f"{name} is {value!r}, not a positive integer")
    if not found:
        if values["hidden_size"] % values["num_attention_heads"]:
            found.append(
                f"hidden_size {values['hidden_size']} is no multiple of "
                f"num_attention_heads {values['num_attention_heads']}"
            )
        if values["patch_size"] > values["image_size"]:
            found.append(f"patch_size {values['patch_size']} is larger than image_size {values['image_size']}")
    return [Problem("config.json", what) for what in found]
