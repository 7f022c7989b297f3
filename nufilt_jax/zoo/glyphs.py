"""A five-by-seven dot font of twelve capital letters, drawn for the built-in task `letters`."""

import numpy as np

LETTERS = "ABEHKLMRSTXZ"

_ROWS = """
.###. ####. ##### #...# #...# #.... #...# ####. .#### ##### #...# #####
#...# #...# #.... #...# #..#. #.... ##.## #...# #.... ..#.. #...# ....#
#...# #...# #.... #...# #.#.. #.... #.#.# #...# #.... ..#.. .#.#. ...#.
##### ####. ####. ##### ##... #.... #.#.# ####. .###. ..#.. ..#.. ..#..
#...# #...# #.... #...# #.#.. #.... #...# #.#.. ....# ..#.. .#.#. .#...
#...# #...# #.... #...# #..#. #.... #...# #..#. ....# ..#.. #...# #....
#...# ####. ##### #...# #...# ##### #...# #...# ####. ..#.. #...# #####
"""


def _parse() -> np.ndarray:
    rows = [line.split() for line in _ROWS.split("\n") if line]
    dots = np.array([[[dot == "#" for dot in cell] for cell in row] for row in rows], np.float32)
    # An empty rim, so that interpolation beyond the glyph finds background.
    return np.pad(dots.transpose(1, 0, 2), ((0, 0), (1, 1), (1, 1)))


GLYPHS = _parse()  # [12, 9, 7], in {0, 1}
