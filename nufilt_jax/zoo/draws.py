"""Images of the built-in tasks: deterministic draws, disjoint by split."""

import dataclasses
import importlib.util
from collections.abc import Iterable
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from nufilt_jax.errors import ConfigError, MissingExtraError, Problem
from nufilt_jax.zoo import patterns
from nufilt_jax.zoo.glyphs import LETTERS

Split = Literal["train", "val", "test"]
_SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nuisance:
    """What an image shows beside its class. Amplitudes are in grey levels, of which black to white is 1."""

    level: float = 1.0  # 0 to 1: movement, tilt and jitter of the pattern
    contrast: tuple[float, float] = (0.4, 0.8)  # range of the distance between the two colours
    grain: float = 0.04  # largest standard deviation of the independent noise of pixels
    clutter: float = 0.0  # amplitude of a smooth random background
    stripes: float = 0.0  # amplitude of fine stripes across the image
    window: float = 0.0  # 0 to 1: how far the pattern fades outside of a round window somewhere
    patch: int = 0  # pixels: side of a square that hides part of the pattern
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)  # added to red, green and blue
    weave: tuple[float, float] = (0.0, 0.0)  # cycles across and down of a faint wave that all images share


# What pre-training sees, of every task: a little of everything.
MILD = Nuisance(level=0.7, contrast=(0.5, 0.9), grain=0.125, clutter=0.08, stripes=0.225, window=0.5, patch=6)
# What fine-tuning, validation and test see. Each task has a look of its own, as data sets in the world have:
# it is what the pre-trained model lacks and what a fine-tuned model's update is about.
HARD: dict[str, Nuisance] = {
    "digits": Nuisance(clutter=0.14),
    "letters": Nuisance(stripes=0.45),
    "shapes": Nuisance(patch=9),
    "orientation": Nuisance(grain=0.4, contrast=(0.25, 0.5)),
    "frequency": Nuisance(window=1.0),
    "position": Nuisance(contrast=(0.1, 0.4), grain=0.2),
    "count": Nuisance(clutter=0.1, stripes=0.2),
    "hue": Nuisance(clutter=0.1, contrast=(0.2, 0.5)),
    "petals": Nuisance(patch=7, grain=0.2),
    "gaps": Nuisance(window=0.5, stripes=0.3),
}

DIGITS = tuple(str(digit) for digit in range(10))
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "digits": DIGITS,
    "letters": tuple(LETTERS),
    "shapes": ("disc", "square", "triangle", "plus", "ring", "frame", "half disc", "bar"),
    "orientation": tuple(f"{15 * step} degrees" for step in range(12)),
    "frequency": tuple(f"{6.5 ** (step / 7):.1f} cycles" for step in range(8)),
    "position": tuple(
        f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")
    ),
    "count": tuple(f"{number} dots" for number in range(1, 9)),
    "hue": tuple(f"hue of {36 * step} degrees" for step in range(10)),
    "petals": tuple(f"{number} petals" for number in range(2, 10)),
    "gaps": tuple(f"gap at {45 * step} degrees" for step in range(8)),
}
STUDY_TASKS = tuple(CLASS_NAMES)
TASK_NAMES = STUDY_TASKS[:6]

_PATTERNS: dict[str, patterns.Pattern] = {
    "letters": patterns.letters,
    "shapes": patterns.shapes,
    "orientation": patterns.orientation,
    "frequency": patterns.frequency,
    "position": patterns.position,
    "count": patterns.count,
    "hue": patterns.blobs,
    "petals": patterns.petals,
    "gaps": patterns.gaps,
}


def draw(
    task: str, split: Split, n: int, nuisance: Nuisance | None = None
) -> tuple[UInt8[np.ndarray, "n 3 32 32"], Int[np.ndarray, " n"]]:
    """Images and labels of one split of one task; the same arguments give the same bits.

    Args:
      task: one of `STUDY_TASKS`.
      split: separate random streams; for `digits` also separate handwritten originals.
      n: how many; classes come in equal numbers, up to rounding, in random order.
      nuisance: what varies beside the class; `HARD[task]` by default.

    Returns:
      RGB images, and labels that index `CLASS_NAMES[task]`.

    Raises:
      ConfigError: no such task.
      MissingExtraError: `digits` needs scikit-learn.
    """
    if task not in CLASS_NAMES:
        raise ConfigError(Problem("task", f"no built-in task {task!r}", f"one of {', '.join(STUDY_TASKS)}"))
    nuisance = HARD[task] if nuisance is None else nuisance
    is_own = nuisance == HARD[task]
    rng = np.random.default_rng([STUDY_TASKS.index(task), _SPLITS.index(split), int(not is_own), 20250921])
    if task == "digits":
        labels, intensity = _draw_digits(split, n, rng, nuisance.level)
    else:
        labels = rng.permutation(np.arange(n) % len(CLASS_NAMES[task]))
        intensity = _PATTERNS[task](labels, rng, nuisance.level)
    hues = labels if task == "hue" else None
    return _colour(intensity, rng, nuisance, hues), labels


def require_originals(names: Iterable[str]) -> None:
    """Refuses tasks whose originals are not there.

    Raises:
      MissingExtraError: `digits` needs scikit-learn.
    """
    if "digits" in names and importlib.util.find_spec("sklearn") is None:
        what = "scikit-learn is not installed and the task `digits` needs it"
        raise MissingExtraError(Problem("", what, "pip install 'nufilt_jax[eval]'"))


def digit_originals(
    split: Split,
) -> tuple[Float[np.ndarray, "n 10 10"], Int[np.ndarray, " n"]]:
    """Handwritten digits of scikit-learn, 8 by 8 with an empty rim: 1000 to train, 297 to validate, 500 to test.

    Raises:
      MissingExtraError: scikit-learn is not installed.
    """
    require_originals(["digits"])
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    glyphs = np.asarray(pixels, np.float32).reshape(-1, 8, 8) / 16
    order = np.random.default_rng(20250921).permutation(len(glyphs))
    start, stop = {"train": (0, 1000), "val": (1000, 1297), "test": (1297, 1797)}[split]
    chosen = order[start:stop]
    return np.pad(glyphs[chosen], ((0, 0), (1, 1), (1, 1))), np.asarray(classes, np.int64)[chosen]


def _draw_digits(
    split: Split, n: int, rng: np.random.Generator, level: float
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n 32 32"]]:
    glyphs, classes = digit_originals(split)
    # Whole passes over the originals, each in a new order: a draw up to their number repeats none.
    passes = [rng.permutation(len(glyphs)) for _ in range(-(-n // len(glyphs)))]
    index = np.concatenate([*passes, np.zeros(0, np.int64)])[:n]
    return classes[index], patterns.stamp(glyphs[index], rng, level)


def _colour(
    intensity: Float[np.ndarray, "n 32 32"],
    rng: np.random.Generator,
    nuisance: Nuisance,
    hues: Int[np.ndarray, " n"] | None,
) -> UInt8[np.ndarray, "n 3 32 32"]:
    """Two colours for figure and ground, then all other nuisance.

    The colours are random, light on dark or dark on light; with `hues`, one of ten for each image, the figure is of
    that hue and the ground of the opposite one.
    """
    n = len(intensity)
    middle = rng.uniform(0.35, 0.65, (n, 3)).astype(np.float32)
    contrast = rng.uniform(*nuisance.contrast, (n, 1)) * rng.choice([-1, 1], (n, 1))
    swing = (contrast * rng.uniform(0.6, 1.0, (n, 3))).astype(np.float32)
    if hues is not None:
        swing = _hue_direction(hues, rng) * abs(contrast).astype(np.float32)
    pattern = intensity - 0.5
    if nuisance.window > 0:
        pattern = pattern * (1 - nuisance.window * (1 - _round_window(n, rng)))
    pixels = middle[:, :, None, None] + swing[:, :, None, None] * pattern[:, None]
    if nuisance.clutter > 0:
        coarse = rng.normal(0, nuisance.clutter, (n, 3, 5, 5)).astype(np.float32)
        pixels = pixels + np.einsum("ncij,yi,xj->ncyx", coarse, _SMOOTH, _SMOOTH, optimize=True)
    if nuisance.stripes > 0:
        pixels = pixels + nuisance.stripes * _stripes(n, rng)[:, None]
    if nuisance.patch > 0:
        colour = rng.uniform(0, 1, (n, 3, 1, 1)).astype(np.float32)
        pixels = np.where(_square(n, nuisance.patch, rng)[:, None], colour, pixels)
    if any(nuisance.tint) or any(nuisance.weave):
        pixels = pixels + _backdrop(n, nuisance, rng)
    spread = rng.uniform(0, nuisance.grain, (n, 1, 1, 1)).astype(np.float32)
    pixels = pixels + spread * rng.standard_normal(pixels.shape, dtype=np.float32)
    return np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def _backdrop(n: int, nuisance: Nuisance, rng: np.random.Generator) -> Float[np.ndarray, "n 3 32 32"]:
    """What all images of a data set have in common: a tint, and a wave of some phase."""
    across, down = np.float32(2 * np.pi / patterns.SIDE) * np.array(nuisance.weave, np.float32)
    phase = rng.uniform(0, 2 * np.pi, (n, 1, 1, 1)).astype(np.float32)
    wave = _WEAVE * np.sin(across * _PIXELS[None, None, None] + down * _PIXELS[None, None, :, None] + phase)
    return np.array(nuisance.tint, np.float32)[None, :, None, None] + wave


def _hue_direction(hues: Int[np.ndarray, " n"], rng: np.random.Generator) -> Float[np.ndarray, "n 3"]:
    """Red, green and blue of a step away from grey, up to a third of the way to the neighbouring hues."""
    angle = 2 * np.pi / 10 * (hues + rng.uniform(-0.33, 0.33, len(hues)))
    return np.cos(angle[:, None] - 2 * np.pi / 3 * np.arange(3)).astype(np.float32)


def _round_window(n: int, rng: np.random.Generator) -> Float[np.ndarray, "n 32 32"]:
    """A Gaussian bump of height 1 and six to nine pixels of standard deviation, near the centre."""
    centre = rng.uniform(10, 21, (n, 2, 1, 1)).astype(np.float32)
    width = rng.uniform(4, 7, (n, 1, 1)).astype(np.float32)
    row, column = np.meshgrid(_PIXELS, _PIXELS, indexing="ij")
    return np.exp(-((row - centre[:, 0]) ** 2 + (column - centre[:, 1]) ** 2) / (2 * width**2))


def _stripes(n: int, rng: np.random.Generator) -> Float[np.ndarray, "n 32 32"]:
    """Upright or level waves of three to six pixels, from -1/2 to 1/2, on a part of the images' strength."""
    wave = 2 * np.pi / rng.uniform(3, 6, (n, 1)).astype(np.float32) * _PIXELS
    wave = 0.5 * np.sin(wave + rng.uniform(0, 2 * np.pi, (n, 1)).astype(np.float32))
    strength = rng.uniform(0.3, 1, (n, 1, 1)).astype(np.float32)
    is_upright = rng.random((n, 1, 1)) < 0.5
    return strength * np.where(is_upright, wave[:, None, :], wave[:, :, None])


def _square(n: int, side: int, rng: np.random.Generator) -> Bool[np.ndarray, "n 32 32"]:
    """A square of `side` pixels somewhere inside the image."""
    corner = rng.integers(0, patterns.SIDE - side + 1, (n, 2, 1))
    inside = (corner <= _PIXELS) & (corner + side > _PIXELS)
    return inside[:, 0, :, None] & inside[:, 1, None, :]


def _smooth_weights() -> Float[np.ndarray, "32 5"]:
    """Linear interpolation from five points to 32 pixels."""
    place = np.linspace(0, 4, patterns.SIDE)
    return np.clip(1 - abs(place[:, None] - np.arange(5)), 0, 1).astype(np.float32)


_WEAVE = np.float32(0.12)  # grey levels
_PIXELS = np.arange(patterns.SIDE, dtype=np.float32)
_SMOOTH = _smooth_weights()
