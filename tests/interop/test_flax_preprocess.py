"""Our preprocessor against transformers 4.57's."""

import pytest
from preprocess_cases import SIZES, assert_same, modes, picture, settings
from transformers import CLIPImageProcessor


@settings
@modes
def test_images(mode, setting):
    for size in SIZES:
        assert_same(CLIPImageProcessor, setting, picture(mode, *size))


@settings
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped(mode, setting):
    for size in SIZES:
        assert_same(CLIPImageProcessor, setting, picture("RGBA", *size).convert(mode))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # theirs warns, ours does not
def test_palettes_with_transparency():
    image = picture("P", 33, 70)
    image.info["transparency"] = bytes(range(256))
    assert_same(CLIPImageProcessor, "defaults", image)
