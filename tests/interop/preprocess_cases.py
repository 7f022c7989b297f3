"""Images and settings for which our preprocessor must do what transformers' does, to the bit."""

import numpy as np
import pytest
from PIL import Image

from nufilt_jax.evaluation.clip.preprocess import parse_preprocessor

# (h, w): odd, alike, tiny, of the size asked for, large. One or three rows are missing: version 4 takes them for
# channels.
SIZES = ((33, 70), (71, 34), (31, 31), (2, 5), (4, 2), (2, 2), (224, 224), (500, 333))
MODES = ("RGB", "L", "P", "1", "CMYK", "opaque")
SETTINGS = {
    "defaults": {},
    "old spelling": {"size": 37, "crop_size": 37, "feature_extractor_type": "CLIPFeatureExtractor"},
    "larger crop": {"size": {"shortest_edge": 30}, "crop_size": {"height": 37, "width": 37}},
    "even padding": {"size": {"shortest_edge": 31}, "crop_size": {"height": 36, "width": 36}},
    "bilinear": {"size": 37, "crop_size": 37, "resample": 2},
    "square": {"size": {"height": 21, "width": 21}, "do_center_crop": False},
    "no resizing": {"do_resize": False, "crop_size": 45},
    "no normalising": {"size": 37, "crop_size": 37, "do_normalize": False},
    "another factor": {"size": 37, "crop_size": 37, "rescale_factor": 1 / 128},
    "other numbers": {"size": 37, "crop_size": 37, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.2, 0.3]},
}

settings = pytest.mark.parametrize("setting", SETTINGS)
modes = pytest.mark.parametrize("mode", MODES)


def picture(mode, height, width):
    """Noise: every pixel matters, and rounding is met in every way."""
    rng = np.random.default_rng(height * 1000 + width)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
    if mode == "RGBA":
        return image
    if mode == "opaque":
        image.putalpha(255)
        return image
    return image.convert("RGB").convert(mode)


def assert_same(processor, setting, image):
    """Bytes to the bit; normalised as the device does it, to float32's accuracy."""
    config = SETTINGS[setting]
    theirs = processor(**config)
    crop = config.get("crop_size", 224) if config.get("do_center_crop", True) else config["size"]
    ours = parse_preprocessor(config, image_size=crop["height"] if isinstance(crop, dict) else crop)
    pixels = ours(image)
    [raw] = theirs(images=image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(pixels, raw)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (ours.mean, ours.std))
    [wanted] = theirs(images=image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose((pixels.astype(np.float32) / 255 - mean) / std, wanted, atol=1e-6, rtol=1e-6)
