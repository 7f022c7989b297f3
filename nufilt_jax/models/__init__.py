"""Flax forward passes with the parameter trees of Hugging Face's Flax classes; evaluation runs them."""

from nufilt_jax.models.clip import ClipVisionModule as ClipVisionModule
from nufilt_jax.models.clip import clip_image_features as clip_image_features
from nufilt_jax.models.clip import vision_features as vision_features
from nufilt_jax.models.clip_config import ClipVisionConfig as ClipVisionConfig
from nufilt_jax.models.clip_config import parse_vision_config as parse_vision_config
from nufilt_jax.models.clip_names import canonical_shapes as canonical_shapes
from nufilt_jax.models.clip_names import to_flax_tree as to_flax_tree
