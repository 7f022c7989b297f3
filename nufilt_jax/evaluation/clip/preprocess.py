"""What a CLIP model's preprocessor does to an image, up to the arithmetic that is left to the device."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from nufilt_jax.errors import CheckpointError, ConfigError, Problem, raise_all

if TYPE_CHECKING:
    from PIL import Image

# As transformers names the class, in its versions; the oldest files call it a feature extractor.
_NAMES = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_DEFAULTS: Mapping[str, Any] = {  # those of the class, for what a file leaves out
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": 224,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_REFUSED = ("do_pad", "use_square_size", "do_flip_channel_order", "do_thumbnail", "do_align_long_axis")

HeightWidth = tuple[int, int]  # height and width in pixels
Triple = tuple[float, float, float]  # one value per channel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessor:
    """Turns an image into the model's pixels, as bytes; `mean` and `std` are what is left to do.

    Attributes:
      size: of the whole image after resizing: its shorter edge, or both; None leaves it as it is.
      crop: of what is cut out of the middle; None for no cut.
      resample: Pillow's number of the filter, such as 3 for bicubic.
      convert_rgb: whether images of other modes are converted; else they are refused.
      mean: per channel, to subtract from the bytes divided by 255.
      std: per channel, to divide by after that.
    """

    size: int | HeightWidth | None
    crop: HeightWidth | None
    resample: int
    convert_rgb: bool
    mean: Triple
    std: Triple

    def __call__(self, image: "Image.Image") -> UInt8[np.ndarray, "3 h w"]:
        """The pixels of an image.

        Transparency is dropped, as transformers 4 does it, with which the paper's models were trained and scored;
        transformers 5 lays the image on white instead.

        Raises:
          ConfigError: the image is not RGB, and the preprocessor does not convert it.
        """
        if image.mode != "RGB":
            if not self.convert_rgb:
                what = f"do_convert_rgb is false, and an image has mode {image.mode}, not RGB"
                raise ConfigError(Problem("preprocessor_config.json", what))
            if "transparency" in image.info:  # converted at once, Pillow would warn
                image = image.convert("RGBA")
            image = image.convert("RGB")
        if self.size is not None:
            height, width = self._resized(image.height, image.width)
            image = image.resize((width, height), resample=self.resample)
        if self.crop is not None:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))  # outside of the image it is black
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    def _resized(self, height: int, width: int) -> HeightWidth:
        if not isinstance(self.size, int):
            assert self.size is not None  # for the type checker: the caller has asked
            return self.size
        longer = int(self.size * max(height, width) / min(height, width))
        return (longer, self.size) if width <= height else (self.size, longer)


def parse_preprocessor(config: Mapping[str, Any], *, image_size: int) -> Preprocessor:
    """Reads a `preprocessor_config.json`.

    Args:
      config: of a `CLIPImageProcessor`, in any version's spelling.
      image_size: height and width that the model's `config.json` asks for.

    Raises:
      CheckpointError: it is another class's, a value is wrong, or it makes images of another size; all is listed.
    """
    values, faults = {name: config.get(name, default) for name, default in _DEFAULTS.items()}, list[str]()
    name = config.get("image_processor_type", config.get("feature_extractor_type", _NAMES[0]))
    if name not in _NAMES:
        faults.append(f"it is of {name!r}, not of {_NAMES[0]}")
    faults += [f"{key} is {config[key]!r}: this is not supported" for key in _REFUSED if config.get(key)]
    for key, value in values.items():
        if (key.startswith("do_") and not isinstance(value, bool)) or (key == "resample" and value not in range(6)):
            faults.append(f"{key} is {value!r}")
    size = _size(values, "size", faults) if values["do_resize"] else None
    crop = _size(values, "crop_size", faults) if values["do_center_crop"] else None
    if isinstance(crop, int):
        crop = (crop, crop)
    mean, std = _arithmetic(values, faults)
    if not faults and (crop or size) != (image_size, image_size):
        what = f"images come out as {_words(crop or size)}, config.json asks for {image_size} by {image_size}"
        faults.append(what)
    fix = "use the file of the pre-trained model"
    raise_all(CheckpointError, (Problem("preprocessor_config.json", what, fix) for what in faults))
    flags = {"resample": values["resample"], "convert_rgb": values["do_convert_rgb"]}
    return Preprocessor(size=size, crop=crop, mean=mean, std=std, **flags)


def _size(values: Mapping[str, Any], key: str, faults: list[str]) -> int | HeightWidth:
    """A size in any spelling; one number means the shorter edge in the case of `size`."""
    value = values[key]
    spelt = value if isinstance(value, dict) else {"shortest_edge": value}
    numbers = [spelt[name] for name in ("shortest_edge", "height", "width") if spelt.get(name) is not None]
    known = {name for name, number in spelt.items() if number is not None}
    is_number = all(isinstance(number, int) and not isinstance(number, bool) and number > 0 for number in numbers)
    if not is_number or known not in ({"shortest_edge"}, {"height", "width"}):
        faults.append(f"{key} is {value!r}, not a number of pixels, nor height and width")
        return 1
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _arithmetic(values: Mapping[str, Any], faults: list[str]) -> tuple[Triple, Triple]:
    """Mean and standard deviation for bytes divided by 255, whatever the file rescales by."""
    factor = values["rescale_factor"] if values["do_rescale"] else 1.0
    mean, std = (values["image_mean"], values["image_std"]) if values["do_normalize"] else (0.0, 1.0)
    if not _is_number(factor) or factor <= 0:
        faults.append(f"rescale_factor is {factor!r}")
        factor = 1.0
    triples: list[Triple] = []
    for key, value, least in (("image_mean", mean, float("-inf")), ("image_std", std, 0.0)):
        numbers = list(value) if isinstance(value, list | tuple) else [value] * 3
        if len(numbers) != 3 or not all(_is_number(number) and number > least for number in numbers):
            faults.append(f"{key} is {value!r}, not three numbers{' above 0' if least == 0 else ''}")
            numbers = [1.0] * 3
        red, green, blue = (float(number) / (255 * factor) for number in numbers)
        triples.append((red, green, blue))
    return triples[0], triples[1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _words(size: int | HeightWidth | None) -> str:
    if size is None:
        return "large as they are in the data set"
    return f"{size[0]} by {size[1]}" if isinstance(size, tuple) else f"{size} and more, by the shape of each"
