"""A merged folder of every family opens in transformers 5's own class, which misses nothing and leaves nothing over."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from nufilt_jax.cli import main

sys.path.append(str(Path(__file__).parents[1] / "architectures"))
import architecture_models as arch

# Of transformers, whichever series wrote the base.
ENTRIES = [entry for entry in arch.ENTRIES if entry.family != "timm"]
OWN = [entry for entry in ENTRIES if entry.series == "5" and not entry.family.endswith("_stacked")]
by_entry = pytest.mark.parametrize("entry", ENTRIES, ids=arch.label)


def opened(entry, folder):
    """The folder in its class, and what the class says of tensors missing, left over or of another shape."""
    kind = getattr(transformers, arch.FAMILIES[entry.family][entry.series]["class"])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    return model, {key: list(names) for key, names in info.items() if names}


def merge(folder):
    return main(arch.merge_command(folder, "--method", "null_space", *arch.FILTER, "--quiet"))


@by_entry
def test_a_merged_folder_opens_in_its_class(entry, tmp_path):
    arch.write_trio(tmp_path, entry.stored(), entry.config)
    assert merge(tmp_path) == 0
    model, problems = opened(entry, tmp_path / "out")
    assert problems == {}
    before, _ = opened(entry, tmp_path / "base")
    layers = {layer.partition("[")[0] for layer in entry.layers}
    assert sum(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)) >= min(
        8, len(layers)
    )


def test_opening_notices_what_does_not_fit(tmp_path):
    entry = arch.Entry("bert", "5")
    tensors = entry.stored()
    del tensors["bert.pooler.dense.bias"]
    arch.write(tmp_path / "m", tensors | {"bert.more.weight": np.ones(2, np.float32)}, entry.config)
    _, problems = opened(entry, tmp_path / "m")
    assert problems == {"missing_keys": ["bert.pooler.dense.bias"], "unexpected_keys": ["bert.more.weight"]}


@pytest.mark.parametrize("entry", OWN, ids=arch.label)
def test_their_own_folders_merge_and_are_written_again_to_the_bit(entry, tmp_path):
    """Base and tasks from `save_pretrained`; what the class reads of the merge and saves again is the merge."""
    arch.write_trio(tmp_path / "drawn", entry.stored(), entry.config)
    for name in ("base", "t1", "t2"):
        opened(entry, tmp_path / "drawn" / name)[0].save_pretrained(tmp_path / name)
    base, layout = arch.weights(tmp_path / "base")
    assert {name: x.shape for name, x in base.items()} == entry.shapes
    assert merge(tmp_path) == 0
    merged, merged_layout = arch.weights(tmp_path / "out")
    assert merged_layout == layout
    opened(entry, tmp_path / "out")[0].save_pretrained(tmp_path / "again")
    again, _ = arch.weights(tmp_path / "again")
    assert again.keys() == merged.keys()
    assert all(arch.same_bits(again[name], x) for name, x in merged.items())
