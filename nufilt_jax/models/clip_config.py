"""The numbers of CLIP's two towers, as `config.json` states them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast

from nufilt_jax.errors import CheckpointError, Problem, raise_all

Activation = Literal["quick_gelu", "gelu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTowerConfig:
    """What the transformers of both towers have. Hashable, so `jit` takes it as a static argument.

    The defaults, here and below, are those of transformers' classes, which leave a value out of `config.json`
    where it equals its default.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int = 12
    num_attention_heads: int
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipVisionConfig(ClipTowerConfig):
    """Shape of a CLIP vision tower."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels, height and width
    patch_size: int = 32  # pixels, height and width

    @property
    def num_positions(self) -> int:
        """Tokens of one image: its whole patches, and the class token before them."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTextConfig(ClipTowerConfig):
    """Shape of a CLIP text tower, and the token that ends a text."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407  # 2 in old files, where it means the highest token of each text


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
    values = _values(config, "vision", ClipVisionConfig)
    found = _problems(values)
    if not found and values["patch_size"] > values["image_size"]:
        found.append(f"patch_size {values['patch_size']} is larger than image_size {values['image_size']}")
    raise_all(CheckpointError, (Problem("config.json", what) for what in found))
    return ClipVisionConfig(**values)


def parse_text_config(config: Mapping[str, Any]) -> ClipTextConfig:
    """Reads the text tower's numbers out of a `config.json`.

    Args:
      config: of a CLIP text model (`model_type` "clip_text_model"), or of a whole CLIP model ("clip"), whose
        text tower stands under `text_config`.

    Returns:
      The tower's shape; what the file leaves out has transformers' default.

    Raises:
      CheckpointError: it is another kind of model, or a value has the wrong type or is out of range.
    """
    values = _values(config, "text", ClipTextConfig)
    raise_all(CheckpointError, (Problem("config.json", what) for what in _problems(values)))
    return ClipTextConfig(**values)


def _values(config: Mapping[str, Any], tower: str, kind: type[ClipTowerConfig]) -> dict[str, Any]:
    """The values of one tower's config, unchecked."""
    model_type = config.get("model_type")
    if model_type not in ("clip", f"clip_{tower}_model"):
        raise CheckpointError(
            Problem(
                "config.json",
                f"model_type is {model_type!r}, not 'clip' or 'clip_{tower}_model'",
                "use the config.json of a CLIP model",
            )
        )
    part = config.get(f"{tower}_config") if model_type == "clip" else config
    if not isinstance(part, Mapping):
        raise CheckpointError(Problem("config.json", f"{tower}_config is {part!r}, not an object"))
    part = cast(Mapping[str, Any], part)
    return {field.name: part.get(field.name, field.default) for field in dataclasses.fields(kind)}


def _problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of one config."""
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
    if not found and values["hidden_size"] % values["num_attention_heads"]:
        found.append(
            f"hidden_size {values['hidden_size']} is no multiple of num_attention_heads {values['num_attention_heads']}"
        )
    return found
