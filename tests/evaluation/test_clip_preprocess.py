"""What a preprocessor file says is done or refused. Whether it is done as transformers does it: tests/interop."""

import image_models as build
import numpy as np
import pytest
from PIL import Image

from nufilt_jax.errors import CheckpointError, ConfigError
from nufilt_jax.evaluation.clip.preprocess import parse_preprocessor

OPENAI = {  # as the file of OpenAI's own checkpoints has it
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}


def gradient(width, height, mode="RGB"):
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 77)], axis=2).astype(np.uint8)).convert(mode)


def test_old_and_new_spellings_mean_the_same():
    new = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_convert_rgb": True}
    new |= {"image_processor_type": "CLIPImageProcessor", "do_rescale": True, "rescale_factor": 1 / 255}
    old = {key: value for key, value in OPENAI.items() if key not in ("size", "crop_size", "feature_extractor_type")}
    assert parse_preprocessor(OPENAI, image_size=224) == parse_preprocessor(old | new, image_size=224)
    assert parse_preprocessor(OPENAI, image_size=224) == parse_preprocessor({}, image_size=224)


@pytest.mark.parametrize("size", [(50, 20), (20, 50), (12, 12), (7, 9), (1, 3), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
def test_the_middle_of_every_image_is_taken(size, mode):
    pixels = parse_preprocessor(build.PREPROCESSOR, image_size=12)(gradient(*size, mode))
    assert pixels.shape == (3, 12, 12)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    if mode == "RGB" and min(size) > 1:
        middle = pixels[:, 5:7, 5:7].mean(axis=(1, 2))
        np.testing.assert_allclose(middle, [127, 127, 77], atol=10)  # half a pixel of the least image
        # The whole of the shorter side is there, and as much of the longer one.
        spans = [float(np.ptp(pixels[0])), float(np.ptp(pixels[1]))]
        wanted = [255 * min(1, size[1] / size[0]), 255 * min(1, size[0] / size[1])]
        np.testing.assert_allclose(spans, wanted, rtol=0.25)


def test_each_step_is_honoured():
    image = gradient(9, 5)
    small = parse_preprocessor({"do_resize": False, "crop_size": 3}, image_size=3)(image)
    np.testing.assert_array_equal(small, np.asarray(image).transpose(2, 0, 1)[:, 1:4, 3:6])
    padded = parse_preprocessor({"do_resize": False, "crop_size": 7}, image_size=7)(image)
    assert not padded[:, 0].any()
    assert not padded[:, -1].any()
    np.testing.assert_array_equal(padded[:, 1:6], np.asarray(image).transpose(2, 0, 1)[:, :, 1:8])
    whole = parse_preprocessor({"size": {"height": 4, "width": 4}, "do_center_crop": False}, image_size=4)(image)
    np.testing.assert_array_equal(whole, np.asarray(image.resize((4, 4), 3)).transpose(2, 0, 1))
    nearest = parse_preprocessor({"size": 4, "crop_size": 4, "resample": 0}, image_size=4)(image)
    assert set(np.unique(nearest[0])) <= set(np.unique(np.asarray(image)[..., 0]))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": 0.5}, lambda x, c: (x / 255 - (0.1, 0.2, 0.3)[c]) / 0.5),
        ({"do_normalize": False}, lambda x, c: x / 255),
        ({"do_normalize": False, "do_rescale": False}, lambda x, c: x),
        ({"image_mean": 3.0, "image_std": 2.0, "do_rescale": False}, lambda x, c: (x - 3) / 2),
        ({"image_mean": 0.5, "image_std": 0.25, "rescale_factor": 1 / 128}, lambda x, c: (x / 128 - 0.5) / 0.25),
    ],
    ids=["usual", "rescaled alone", "bytes", "normalised alone", "other factor"],
)
def test_arithmetic_is_left_in_one_form(config, wanted):
    preprocessor = parse_preprocessor(config, image_size=224)
    for channel in range(3):
        for byte in (0, 100, 255):
            found = (byte / 255 - preprocessor.mean[channel]) / preprocessor.std[channel]
            assert found == pytest.approx(wanted(byte, channel), rel=1e-9, abs=1e-9)


def test_transparency_is_dropped_without_a_warning():
    image = gradient(12, 12).convert("P")
    image.info["transparency"] = bytes([0] * 256)
    opaque = gradient(12, 12).convert("P")
    preprocessor = parse_preprocessor(build.PREPROCESSOR, image_size=12)
    np.testing.assert_array_equal(preprocessor(image), preprocessor(opaque))
    clear = gradient(12, 12)
    clear.putalpha(0)
    np.testing.assert_array_equal(preprocessor(clear), preprocessor(gradient(12, 12)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "it is of 'ViTImageProcessor', not of CLIPImageProcessor"),
        ({"resample": 7}, "resample is 7"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"do_resize": 1}, "do_resize is 1"),
        ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "not a number of pixels"),
        ({"size": {"height": 224}}, "not a number of pixels"),
        ({"size": 0}, "size is 0"),
        ({"crop_size": "224"}, "crop_size is '224'"),
        ({"image_mean": [0.5, 0.5]}, "not three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "not three numbers above 0"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
        ({"do_pad": True}, "do_pad is True: this is not supported"),
        ({"crop_size": 200}, "images come out as 200 by 200, config.json asks for 224 by 224"),
        ({"do_center_crop": False}, "images come out as 224 and more, by the shape of each"),
        ({"do_center_crop": False, "do_resize": False}, "large as they are in the data set"),
    ],
)
def test_what_cannot_be_done_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        parse_preprocessor(OPENAI | change, image_size=224)


def test_all_faults_of_a_file_are_listed():
    with pytest.raises(CheckpointError) as caught:
        parse_preprocessor(OPENAI | {"resample": 9, "size": -1, "image_std": 0, "do_pad": True}, image_size=224)
    assert len(caught.value.problems) == 4


def test_other_modes_need_leave_to_convert():
    preprocessor = parse_preprocessor(build.PREPROCESSOR | {"do_convert_rgb": False}, image_size=12)
    assert preprocessor(gradient(20, 20)).shape == (3, 12, 12)
    with pytest.raises(ConfigError, match="do_convert_rgb is false, and an image has mode L"):
        preprocessor(gradient(20, 20, "L"))
