"""Names of linear layers, sorted: by block, and into the groups that the figures show."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

WHOLE_MODEL = "whole model"
_GROUPS = {WHOLE_MODEL: "", "attention": r"attn|attention", "MLP": r"mlp|DenseReluDense"}
LAYER_GROUPS = tuple(_GROUPS)

_BLOCK = re.compile(r"(?P<stem>.*?)\.(?P<number>\d+)\.(?P<part>.+)")


def in_group(names: Sequence[str], group: str) -> Bool[np.ndarray, " layers"]:
    """Which layers belong to one of `LAYER_GROUPS`.

    >>> in_group(["h.0.self_attn.q_proj.weight", "h.0.mlp.fc1.weight"], "attention").tolist()
    [True, False]
    """
    pattern = re.compile(_GROUPS[group], re.IGNORECASE)
    return np.array([bool(pattern.search(name)) for name in names], bool)


def by_block(names: Sequence[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Layers block by block, in the order of the forward pass: (short name of the block, its layers).

    >>> by_block(["vision_model.encoder.layers.10.mlp.fc1.weight", "vision_model.encoder.layers.2.mlp.fc1.weight"])[0]
    ('2', ('vision_model.encoder.layers.2.mlp.fc1.weight',))
    """
    blocks: dict[tuple[str, int], list[str]] = {}
    for name in names:
        found = _BLOCK.fullmatch(name)
        # What is in no block comes before all of them: their numbers begin at 0.
        key = ("", -1) if found is None else (found["stem"], int(found["number"]))
        blocks.setdefault(key, []).append(name)
    several = len({stem for stem, _ in blocks}) > 1

    def title(stem: str, number: int) -> str:
        side = stem.split(".")[0][:3] + " " if several and stem else ""
        return f"{side}{number}" if number >= 0 else "rest"

    return tuple((title(*key), tuple(sorted(blocks[key], key=_place))) for key in sorted(blocks))


_ORDER = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def short(name: str) -> str:
    """A layer's own name within its block.

    >>> short("vision_model.encoder.layers.2.self_attn.out_proj.weight")
    'out'
    """
    return name.removesuffix(".weight").rsplit(".", 1)[-1].removesuffix("_proj")


def _place(name: str) -> tuple[int, str]:
    layer = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return (_ORDER.index(layer) if layer in _ORDER else len(_ORDER), name)
