"""Our preprocessor against transformers 5's, the one that Pillow does the work for."""

import numpy as np
from preprocess_cases import SIZES, assert_same, modes, picture, settings
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from nufilt_jax.evaluation.clip.preprocess import parse_preprocessor


@settings
@modes
def test_images(mode, setting):
    for size in (*SIZES, (3, 5), (1, 2), (1, 1)):
        assert_same(CLIPImageProcessorPil, setting, picture(mode, *size))


def test_transparency_is_where_they_part():
    """Version 5 lays an image on white; we drop what is transparent, as version 4 did when the models were scored."""
    image = picture("RGBA", 33, 70)
    ours = parse_preprocessor({}, image_size=224)(image)
    raw = CLIPImageProcessorPil(do_rescale=False, do_normalize=False)
    [theirs] = raw(images=image, return_tensors="np")["pixel_values"]
    [dropped] = raw(images=image.convert("RGB"), return_tensors="np")["pixel_values"]
    assert not np.array_equal(ours, theirs)
    np.testing.assert_array_equal(ours, dropped)
