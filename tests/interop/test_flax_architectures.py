"""Merged folders of the 4.x series: in the Flax classes where transformers 4.57 has one, by names and shapes elsewhere.

Its torch classes do not run here, where there is no torch; what they store was recorded (tests/architectures).
"""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

from nufilt_jax.cli import main

sys.path.append(str(Path(__file__).parents[1] / "architectures"))
import architecture_models as arch

ENTRIES = [entry for entry in arch.ENTRIES if entry.series == "4.57"]
# Not Llama, Mistral, Gemma and T5: their Flax classes do not run on the jax of today.
FLAX = (
    "bart",
    "bert",
    "bert_model",
    "clip",
    "dinov2",
    "distilbert",
    "gpt2",
    "gpt2_model",
    "roberta",
    "vit",
    "vit_model",
)
FLAX = (*FLAX, "whisper")
GPT2 = arch.Entry("gpt2", "4.57")


def merge(folder, *options):
    return main(arch.merge_command(folder, "--method", "null_space", *arch.FILTER, "--quiet", *options))


@pytest.mark.parametrize("entry", ENTRIES, ids=arch.label)
def test_a_merged_folder_holds_what_the_class_stores(entry, tmp_path):
    arch.write_trio(tmp_path, entry.stored(), entry.config)
    assert merge(tmp_path) == 0
    merged, _ = arch.weights(tmp_path / "out")
    assert {name: x.shape for name, x in merged.items()} == entry.shapes
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


def opened(entry, folder, caplog):
    """The folder in its Flax class, and what that said of tensors missing, left over or of another shape."""
    kind = getattr(transformers, "Flax" + arch.FAMILIES[entry.family][entry.series]["class"])
    transformers.logging.enable_propagation()
    caplog.clear()
    model = kind.from_pretrained(folder)
    transformers.logging.disable_propagation()
    return model, [r.getMessage() for r in caplog.records if "weights" in r.getMessage()]


@pytest.mark.parametrize("family", FLAX)
def test_a_merged_folder_opens_in_its_flax_class(family, tmp_path, caplog):
    entry = arch.Entry(family, "4.57")
    arch.write_trio(tmp_path, entry.stored(), entry.config)
    assert merge(tmp_path) == 0
    (before, notes), (after, more) = (opened(entry, tmp_path / name, caplog) for name in ("base", "out"))
    assert (notes, more) == ([], [])
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.params, after.params)
    assert sum(jax.tree.leaves(changed)) == len(entry.layers)


def test_a_gpt2_in_flax_files_merges_as_in_safetensors(tmp_path, caplog):
    """Flax keeps the matrices of Conv1D the other way round than it keeps all others."""
    arch.write_trio(tmp_path / "torch", GPT2.stored(), GPT2.config)
    for name in ("base", "t1", "t2"):
        opened(GPT2, tmp_path / "torch" / name, caplog)[0].save_pretrained(tmp_path / "flax" / name)
        assert (tmp_path / "flax" / name / "flax_model.msgpack").exists()
    params = []
    for kind in ("torch", "flax"):
        assert merge(tmp_path / kind) == 0
        model, notes = opened(GPT2, tmp_path / kind / "out", caplog)
        assert notes == []
        params.append(model.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *params)
