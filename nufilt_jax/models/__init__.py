"""Flax forward passes with the parameter trees of Hugging Face's Flax classes; evaluation runs them."""

from nufilt_jax.models.clip import ClipVisionModule as ClipVisionModule
from nufilt_jax.models.clip import clip_image_features as clip_image_features
from nufilt_jax.models.clip import vision_features as vision_features
from nufilt_jax.models.clip_config import ClipTextConfig as ClipTextConfig
from nufilt_jax.models.clip_config import ClipVisionConfig as ClipVisionConfig
from nufilt_jax.models.clip_config import parse_text_config as parse_text_config
from nufilt_jax.models.clip_config import parse_vision_config as parse_vision_config
from nufilt_jax.models.clip_names import canonical_shapes as canonical_shapes
from nufilt_jax.models.clip_names import to_flax_tree as to_flax_tree
from nufilt_jax.models.clip_text import ClipTextModule as ClipTextModule
from nufilt_jax.models.clip_text import clip_text_features as clip_text_features
from nufilt_jax.models.clip_text import text_features as text_features
from nufilt_jax.models.clip_text_names import text_shapes as text_shapes
from nufilt_jax.models.clip_text_names import to_text_tree as to_text_tree
from nufilt_jax.models.t5 import T5Module as T5Module
from nufilt_jax.models.t5 import t5_generate as t5_generate
from nufilt_jax.models.t5 import t5_logits as t5_logits
from nufilt_jax.models.t5 import t5_tree_generate as t5_tree_generate
from nufilt_jax.models.t5 import t5_tree_logits as t5_tree_logits
from nufilt_jax.models.t5_config import T5Config as T5Config
from nufilt_jax.models.t5_config import parse_t5_config as parse_t5_config
from nufilt_jax.models.t5_names import t5_shapes as t5_shapes
from nufilt_jax.models.t5_names import to_t5_tree as to_t5_tree

__all__ = [
    "ClipTextConfig",
    "ClipTextModule",
    "ClipVisionConfig",
    "ClipVisionModule",
    "T5Config",
    "T5Module",
    "canonical_shapes",
    "clip_image_features",
    "clip_text_features",
    "parse_t5_config",
    "parse_text_config",
    "parse_vision_config",
    "t5_generate",
    "t5_logits",
    "t5_shapes",
    "t5_tree_generate",
    "t5_tree_logits",
    "text_features",
    "text_shapes",
    "to_flax_tree",
    "to_t5_tree",
    "to_text_tree",
    "vision_features",
]


def __dir__() -> list[str]:
    return list(__all__)
