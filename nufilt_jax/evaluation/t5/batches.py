"""Texts of different lengths as arrays of few shapes, so that few programs are compiled."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

MAX_TOKENS = 512  # of a text; what is longer is cut, as T5's pre-training cut it
_SHORTEST = 32  # shapes are this long, or twice, four times ... as long
_TOKENS = 8192  # per batch, padding included: short texts come in large batches, long ones in small
_MIXED_BATCH = 32  # texts per batch for models with experts, whose answers depend on it (the baselines' settings)


class TextBatch(NamedTuple):
    """Some texts, padded to one length.

    Attributes:
      rows: which texts: those of the array's first rows. What follows them is filler, to be ignored.
      ids: tokens.
      mask: zero at padding.
    """

    rows: tuple[int, ...]
    ids: Int[np.ndarray, "b t"]
    mask: Int[np.ndarray, "b t"]


def bucketed_batches(texts: Sequence[Sequence[int]], *, pad: int, multiple_of: int = 1) -> Iterator[TextBatch]:
    """Every text once, together with others of about its length; lengths and numbers of rows are powers of two.

    Args:
      texts: tokens of each, `MAX_TOKENS` at most.
      pad: the token that fills the rest.
      multiple_of: batches have so many rows, or a multiple, to be split over devices.
    """
    longest_first = sorted(range(len(texts)), key=lambda row: len(texts[row]), reverse=True)
    while longest_first:
        length = _power_of_two(max(len(texts[longest_first[0]]), _SHORTEST))
        n_rows = min(_TOKENS // length, _power_of_two(len(texts)))
        n_rows = -(-n_rows // multiple_of) * multiple_of
        rows = [row for row in longest_first[:n_rows] if 2 * len(texts[row]) > length or length == _SHORTEST]
        yield _batch(texts, rows, n_rows, length, pad)
        del longest_first[: len(rows)]


def mixed_batches(texts: Sequence[Sequence[int]], *, pad: int) -> Iterator[TextBatch]:
    """The texts in their order, all padded to `MAX_TOKENS`, what is left over as a batch of its own.

    So the authors' program has it, and for a model with experts a text's answer is that of its batch, padding included.
    """
    for start in range(0, len(texts), _MIXED_BATCH):
        rows = range(start, min(start + _MIXED_BATCH, len(texts)))
        yield _batch(texts, rows, len(rows), MAX_TOKENS, pad)


def _batch(texts: Sequence[Sequence[int]], rows: Sequence[int], n_rows: int, length: int, pad: int) -> TextBatch:
    ids = np.full((n_rows, length), pad, np.int32)
    mask = np.zeros((n_rows, length), np.int32)
    # The filler is the first text again: generation ends when all have ended, and padding alone may never end.
    for index in range(n_rows):
        text = texts[rows[index if index < len(rows) else 0]]
        ids[index, : len(text)] = text
        mask[index, : len(text)] = 1
    return TextBatch(tuple(rows), ids, mask)


def _power_of_two(n: int) -> int:
    """The smallest that is not below `n`."""
    return 1 << (n - 1).bit_length()
