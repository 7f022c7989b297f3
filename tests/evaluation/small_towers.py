"""A vision tower of one block, small enough to run hundreds of times."""

import numpy as np

from nufilt_jax.models import canonical_shapes, parse_vision_config

CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 4,
    "patch_size": 2,
}


def random_params(seed=0, base=None, **extra):
    rng = np.random.default_rng(seed)
    shapes = canonical_shapes(parse_vision_config(CONFIG)) | extra
    params = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    return params if base is None else {name: base[name] + np.float32(0.2) * x for name, x in params.items()}
