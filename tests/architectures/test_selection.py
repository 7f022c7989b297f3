"""The layers that a merge takes of each family, against the hand-written table."""

import architecture_models as arch
import pytest
from record import MODELS

ASKED_FOR = {
    *("bert", "roberta", "distilbert", "sentence_transformers", "gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma"),
    *("mixtral", "phi3", "vit", "dinov2", "swin", "timm", "siglip", "clip", "llava", "whisper", "bart", "t5"),
}


def planned(nufilt, folder, *options):
    result = nufilt(*arch.merge_command(folder, "--plan", "--json", *options))
    assert result.code == 0, result.err
    return result.json


def test_all_families_are_recorded_in_both_series():
    assert arch.FAMILIES.keys() >= ASKED_FOR and arch.FAMILIES.keys() == arch.LAYERS.keys()
    assert all(set(arch.FAMILIES[family]) == {"4.57", "5"} for family in MODELS)


@pytest.mark.parametrize("entry", arch.ENTRIES, ids=arch.label)
def test_the_default_is_the_table(entry, tmp_path, nufilt):
    arch.write_trio(tmp_path, entry.stored(), entry.config)
    assert len(set(entry.layers)) == len(entry.layers) >= 8
    assert {layer.partition("[")[0] for layer in entry.layers} <= entry.shapes.keys()
    plan = planned(nufilt, tmp_path, "--method", "null_space", *arch.FILTER)
    assert sorted(plan["layers_selected"]) == sorted(entry.layers)
    wanted = {}
    for layer in entry.layers:
        shape = entry.matrix(entry.stored(), layer).shape
        wanted[shape] = wanted.get(shape, 0) + 1
    found = {}
    for stack in plan["stacks"]:
        found[tuple(stack["shape"])] = found.get(tuple(stack["shape"]), 0) + stack["layers"]
    assert found == wanted  # as [d_out, d_in]


@pytest.mark.parametrize("shards", [1, 3], ids=["single", "sharded"])
def test_nufilt_and_sum_take_the_same(shards, tmp_path, nufilt):
    entry = arch.Entry("gpt_oss", "5")
    arch.write_trio(tmp_path, entry.stored(), entry.config, shards=shards)
    for method, options in (("nufilt", arch.RANKS), ("sum", ())):
        plan = planned(nufilt, tmp_path, "--method", method, *options)
        assert sorted(plan["layers_selected"]) == sorted(entry.layers)


def test_convolutions_only_if_asked_for(tmp_path, nufilt):
    entry = arch.Entry("convnext", "5")
    arch.write_trio(tmp_path, entry.stored(), entry.config)
    plan = planned(nufilt, tmp_path, "--method", "null_space", *arch.FILTER, "--conv")
    convolutions = {
        *arch.braces("convnext.encoder.stages.{0,1}.layers.{0,1}.dwconv.weight"),
        "convnext.encoder.stages.1.downsampling_layer.1.weight",
    }
    assert set(plan["layers_selected"]) == {*entry.layers, *convolutions}
    shapes = {tuple(stack["shape"]) for stack in plan["stacks"]}
    assert {(16, 49), (32, 49), (32, 64)} <= shapes  # [out, in·kh·kw]
