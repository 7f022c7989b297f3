"""Drawn patterns of the built-in tasks: a class, and everything else left to chance.

Every function maps labels to intensities in [0, 1], `[n, 32, 32]`, with one vectorised numpy program.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from nufilt_jax.zoo.glyphs import GLYPHS

SIDE = 32  # pixels
_AXIS = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE * 2 - 1  # pixel centres in [-1, 1]

Labels = Int[np.ndarray, " n"]
Images = Float[np.ndarray, "n 32 32"]
Pattern = Callable[[Labels, np.random.Generator, float], Images]


def orientation(labels: Labels, rng: np.random.Generator, level: float) -> Images:
    """Gratings of twelve orientations, 15 degrees apart; wavelength, phase and a small tilt vary."""
    n = len(labels)
    angle = np.pi / 12 * (labels + level * rng.uniform(-0.35, 0.35, n))
    return _grating(angle, rng.uniform(1.5, 5.0, n), rng)


def frequency(labels: Labels, rng: np.random.Generator, level: float) -> Images:
    """Gratings of eight spatial frequencies, 1 to 6.5 cycles per image, evenly spaced in the logarithm."""
    n = len(labels)
    step = np.log(6.5) / 7
    cycles = np.exp(step * (labels + level * rng.uniform(-0.35, 0.35, n)))
    return _grating(rng.uniform(0, np.pi, n), cycles, rng)


def _grating(angle: Float[np.ndarray, " n"], cycles: Float[np.ndarray, " n"], rng: np.random.Generator) -> Images:
    x, y = _place(len(angle), angle=angle, centre=None, size=None)
    del y
    phase = rng.uniform(0, 2 * np.pi, len(angle))
    wave = np.sin(np.pi * _column(cycles) * x + _column(phase))
    return 0.5 + 0.5 * wave


def shapes(labels: Labels, rng: np.random.Generator, level: float) -> Images:
    """Disc, square, triangle, plus, ring, frame, half disc or bar, filled; place, size and tilt vary."""
    n = len(labels)
    centre = level * rng.uniform(-0.35, 0.35, (n, 2))
    size = rng.uniform(0.6 - 0.2 * level, 0.7, n)
    angle = level * rng.uniform(-0.5, 0.5, n)
    x, y = _place(n, angle=angle, centre=centre, size=size)
    radius, largest = np.hypot(x, y), np.maximum(abs(x), abs(y))
    plus = np.minimum(np.maximum(abs(x), 3 * abs(y)), np.maximum(3 * abs(x), abs(y)))
    triangle = np.maximum(y + 0.35, 0.87 * abs(x) - 0.5 * (y - 0.35)) + 0.3
    gauges = [
        radius,
        largest / 0.88,
        triangle,
        plus,
        np.maximum(radius, 1.55 - radius),
        np.maximum(largest / 0.9, 1.5 - largest),
        np.maximum(radius, 1 + 2 * x),
        np.maximum(abs(y), abs(x) / 0.35),
    ]
    # Broadcasting all eight gauges would cost eight times the memory; each image needs its own only.
    gauge = np.zeros_like(x)
    for index, each in enumerate(gauges):
        gauge = np.where(_column(labels == index), each, gauge)
    return _soft_edge((1 - gauge) * _column(size))


def position(labels: Labels, rng: np.random.Generator, level: float) -> Images:
    """A dot in one of nine cells, three by three; its place in the cell and its size vary."""
    n = len(labels)
    cell = np.stack([labels % 3, labels // 3], axis=1)
    centre = (cell - 1) * 0.62 + level * rng.uniform(-0.22, 0.22, (n, 2))
    x, y = _place(n, angle=None, centre=centre, size=None)
    return _soft_edge(_column(rng.uniform(0.14, 0.24, n)) - np.hypot(x, y))


def count(labels: Labels, rng: np.random.Generator, level: float) -> Images:
    """One to eight dots, each in a cell of its own of nine; their places in the cells and their sizes vary."""
    n = len(labels)
    rank = rng.permuted(np.tile(np.arange(9), (n, 1)), axis=1)
    intensity = np.zeros((n, SIDE, SIDE), np.float32)
    for cell in range(9):
        centre = (np.array([[cell % 3, cell // 3]]) - 1) * 0.62 + level * rng.uniform(-0.1, 0.1, (n, 2))
        x, y = _place(n, angle=None, centre=centre, size=None)
        dot = _soft_edge(_column(rng.uniform(0.14, 0.22, n)) - np.hypot(x, y))
        intensity += dot * _column(rank[:, cell] <= labels)
    return np.minimum(intensity, 1)


def petals(labels: Labels, rng: np.random.Generator, level: float) -> Images:
    """Rosettes of two to nine petals; place, size and turn vary."""
    n = len(labels)
    centre = level * rng.uniform(-0.25, 0.25, (n, 2))
    size = rng.uniform(0.9 - 0.25 * level, 0.95, n)
    x, y = _place(n, angle=rng.uniform(0, 2 * np.pi, n), centre=centre, size=size)
    wave = 0.5 + 0.5 * np.cos(_column(labels + 2) * np.arctan2(y, x))
    return wave * _soft_edge((1 - np.hypot(x, y)) * _column(size))


def gaps(labels: Labels, rng: np.random.Generator, level: float) -> Images:
    """Rings with a gap that looks in one of eight directions; place, size, gap and a small turn vary."""
    n = len(labels)
    centre = level * rng.uniform(-0.3, 0.3, (n, 2))
    size = rng.uniform(0.7 - 0.2 * level, 0.75, n)
    angle = np.pi / 4 * (labels + level * rng.uniform(-0.3, 0.3, n))
    x, y = _place(n, angle=angle, centre=centre, size=size)
    radius = np.hypot(x, y)
    ring = np.maximum(radius, 1.5 - radius)
    is_gap = (x > 0) & (abs(y) < _column(rng.uniform(0.22, 0.34, n)))
    return np.where(is_gap, 0, _soft_edge((1 - ring) * _column(size))).astype(np.float32)


def blobs(labels: Labels, rng: np.random.Generator, level: float) -> Images:
    """Three round blobs anywhere, whatever the class: what is told apart by colour alone."""
    n = len(labels)
    intensity = np.zeros((n, SIDE, SIDE), np.float32)
    for _ in range(3):
        x, y = _place(n, angle=None, centre=level * rng.uniform(-0.8, 0.8, (n, 2)), size=None)
        intensity = np.maximum(intensity, _soft_edge(_column(rng.uniform(0.2, 0.5, n)) - np.hypot(x, y)))
    return intensity


def letters(labels: Labels, rng: np.random.Generator, level: float) -> Images:
    """Twelve capital letters of a five-by-seven dot font; place, size, tilt and slant vary."""
    return stamp(GLYPHS[labels], rng, level)


def stamp(glyphs: Float[np.ndarray, "n gh gw"], rng: np.random.Generator, level: float) -> Images:
    """Draws small grey pictures onto the canvas, moved, scaled, tilted and slanted by chance.

    Args:
      glyphs: intensities in [0, 1], each with an empty rim of one pixel.
      rng: source of the nuisance variation.
      level: 0 draws all alike; 1 moves by up to a seventh of the image and tilts by up to 20 degrees.

    Returns:
      The canvases, by bilinear interpolation.
    """
    n, height, width = glyphs.shape
    centre = level * rng.uniform(-0.2, 0.2, (n, 2))
    size = rng.uniform(0.8 - 0.22 * level, 0.85, n)
    angle = level * rng.uniform(-0.25, 0.25, n)
    x, y = _place(n, angle=angle, centre=centre, size=size)
    x = x + _column(level * rng.uniform(-0.2, 0.2, n)) * y
    aspect = width / height
    column = np.clip((x / aspect + 1) * width / 2 - 0.5, 0, width - 1.001)
    row = np.clip((y + 1) * height / 2 - 0.5, 0, height - 1.001)
    left, top = column.astype(np.int32), row.astype(np.int32)
    right_share, low_share = column - left, row - top
    which = np.arange(n)[:, None, None]
    upper = glyphs[which, top, left] * (1 - right_share) + glyphs[which, top, left + 1] * right_share
    lower = glyphs[which, top + 1, left] * (1 - right_share) + glyphs[which, top + 1, left + 1] * right_share
    return (upper * (1 - low_share) + lower * low_share).astype(np.float32)


def _place(
    n: int,
    *,
    angle: Float[np.ndarray, " n"] | None,
    centre: Float[np.ndarray, "n 2"] | None,
    size: Float[np.ndarray, " n"] | None,
) -> tuple[Images, Images]:
    """Coordinates of every pixel in a frame that is moved, turned and scaled for each image."""
    x = np.broadcast_to(_AXIS[None, None, :], (n, SIDE, SIDE))
    y = np.broadcast_to(_AXIS[None, :, None], (n, SIDE, SIDE))
    if centre is not None:
        x, y = x - _column(centre[:, 0]), y - _column(centre[:, 1])
    if angle is not None:
        cosine, sine = _column(np.cos(angle)), _column(np.sin(angle))
        x, y = cosine * x + sine * y, cosine * y - sine * x
    if size is not None:
        x, y = x / _column(size), y / _column(size)
    return x, y


def _column(values: np.ndarray) -> np.ndarray:
    """One value per image, ready to meet `[n, 32, 32]`; float64 would double the work."""
    values = values if values.dtype == bool else values.astype(np.float32)
    return values[:, None, None]


def _soft_edge(inside: Images) -> Images:
    """1 inside (positive distance), 0 outside, one pixel of ramp between them."""
    return np.clip(inside * SIDE / 2 + 0.5, 0, 1).astype(np.float32)
