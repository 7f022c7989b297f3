"""The built-in model family `tiny`: a CLIP vision tower for 32 by 32 pixels."""

from typing import Any

IMAGE_SIDE = 32  # pixels
IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.25, 0.25, 0.25)

CONFIG: dict[str, Any] = {
    "architectures": ["CLIPVisionModel"],
    "attention_dropout": 0.0,
    "hidden_act": "quick_gelu",
    "hidden_size": 128,
    "image_size": IMAGE_SIDE,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 192,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 8,
    "projection_dim": 128,
    "torch_dtype": "float32",
}

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
