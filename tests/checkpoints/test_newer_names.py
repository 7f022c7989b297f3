"""Adapters in the names of transformers 5, on bases whose files keep those of the 4.x series."""

import adapter_builders as adapters
import model_builders as build
import numpy as np
import pytest

from nufilt_jax.checkpoints import open_checkpoint, open_task
from nufilt_jax.checkpoints.newer_names import newer_names
from nufilt_jax.checkpoints.peft.spelling import in_series_of, is_newer

W = build.WIDTH
VIT = {
    f"vit.encoder.layer.{i}.{module}": (W, W)
    for i in (0, 1)
    for module in ("attention.attention.query", "attention.output.dense", "intermediate.dense", "output.dense")
}
# (model type, a module in the files, the same in transformers 5)
SAME = [
    ("vit", "vit.encoder.layer.0.attention.attention.query", "vit.layers.0.attention.q_proj"),
    ("deit", "deit.encoder.layer.1.attention.output.dense", "deit.layers.1.attention.o_proj"),
    ("beit", "beit.encoder.layer.1.intermediate.dense", "beit.layers.1.mlp.fc1"),
    ("vit_mae", "decoder.decoder_layers.0.output.dense", "decoder.decoder_layers.0.mlp.fc2"),
    ("dinov2", "dinov2.encoder.layer.0.attention.attention.key", "dinov2.encoder.layer.0.attention.k_proj"),
    ("swin", "swin.encoder.layers.0.blocks.1.attention.self.value", "swin.encoder.layers.0.blocks.1.attention.v_proj"),
    ("segformer", "segformer.encoder.block.1.0.mlp.dense1", "segformer.stages.1.blocks.0.mlp.fc1"),
    ("qwen2_vl", "model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),
    ("qwen2_5_vl", "visual.blocks.0.attn.proj", "model.visual.blocks.0.attn.proj"),
    ("gemma3", "vision_tower.vision_model.encoder.layers.0.mlp.fc1", "model.vision_tower.encoder.layers.0.mlp.fc1"),
    ("mllama", "vision_model.transformer.layers.0.mlp.fc1", "model.vision_model.transformer.layers.0.mlp.fc1"),
    ("llava", "language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
    ("mixtral", "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"),
    ("granitemoe", "model.layers.0.block_sparse_moe.router.layer", "model.layers.0.block_sparse_moe.router"),
    ("phimoe", "model.layers.1.block_sparse_moe.gate", "model.layers.1.mlp.router"),
    ("gpt_neox", "embed_out", "lm_head"),
]


def written(folder, modules, **config):
    rng = np.random.default_rng(0)
    tensors = {f"{m}.weight": rng.standard_normal(s).astype(np.float32) for m, s in modules.items()}
    tensors |= {f"{m}.bias": np.zeros(s[0], np.float32) for m, s in modules.items()}
    return tensors, open_checkpoint(str(build.write(folder, tensors, **config)), role="base")


@pytest.mark.parametrize(("model_type", "stored", "module"), SAME, ids=[row[0] for row in SAME])
def test_modules_of_either_series_are_the_base_s(tmp_path, model_type, stored, module):
    config = {"model_type": model_type}
    assert newer_names([stored, module], config) == {stored: module, module: module}
    tensors, base = written(tmp_path / "base", {stored: (W, W), "classifier": (3, W)}, **config)
    for name in (stored, module):
        pair = adapters.factors(tensors, 1, modules=(stored,))[stored]
        folder = adapters.write(tmp_path / name, {name: pair}, target_modules=[name])
        read, [changed] = (
            open_task(str(folder), base).read(),
            [x for x in base.tensors if x.endswith(f"{stored}.weight")],
        )
        expected = adapters.merged(tensors, {stored: pair})[f"{stored}.weight"]
        np.testing.assert_allclose(read[changed], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("class_prefix", ["vit.", ""])
@pytest.mark.parametrize("base_prefix", ["vit.", ""])
def test_models_with_and_without_a_head(tmp_path, base_prefix, class_prefix):
    """An adapter of the class with a head on a base that was saved without, and the reverse; whole tensors too."""
    modules = {base_prefix + name.removeprefix("vit."): shape for name, shape in VIT.items()}
    tensors, base = written(tmp_path / "base", modules, model_type="vit")
    stored = f"{base_prefix}encoder.layer.1.attention.output.dense"
    pair = adapters.factors(tensors, 1, modules=(stored,))[stored]
    module, bias = f"{class_prefix}layers.1.attention.o_proj", np.full(W, 7, np.float32)
    extra = {f"{adapters.PREFIX}{module}.base_layer.bias": bias}
    folder = adapters.write(tmp_path / "a", {module: pair}, extra=extra, bias="all", target_modules=["o_proj"])
    read = open_task(str(folder), base).read()
    assert read.keys() == tensors.keys()
    expected = adapters.merged(tensors, {stored: pair})[f"{stored}.weight"]
    np.testing.assert_allclose(read[f"{stored}.weight"], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(read[f"{stored}.bias"], bias)


def test_newer_modules_without_factors_are_told(tmp_path):
    """The targets of an adapter of transformers 5 name modules as that does."""
    tensors, base = written(tmp_path / "base", VIT, model_type="vit")
    query = "vit.encoder.layer.0.attention.attention.query"
    pair = adapters.factors(tensors, 1, modules=(query,))[query]
    module = "vit.layers.0.attention.q_proj"
    folder = adapters.write(tmp_path / "a", {module: pair}, target_modules=["q_proj"])
    [notice] = open_task(str(folder), base).notices
    assert "no factors of 1 matrices" in notice and "vit.encoder.layer.*.attention.attention.query" in notice


def test_models_that_neither_series_renames():
    bert = ["encoder.layer.0.attention.output.dense.weight", "model.layers.0.mlp.up_proj.weight"]
    for config in ({"model_type": "bert"}, {"model_type": "qwen2"}, {}):
        assert newer_names(bert, config) == dict(zip(bert, bert, strict=True))


def test_a_class_without_a_head_has_no_outer_model():
    config = {"model_type": "qwen2_vl", "architectures": ["Qwen2VLModel"]}
    assert newer_names(["visual.merger.ln_q"], config) == {"visual.merger.ln_q": "visual.merger.ln_q"}


def test_two_adapters_in_names_of_both_series():
    """What one calls its modules decides; whole tensors keep their last part."""
    config = {"model_type": "vit"}
    query, bias = "vit.encoder.layer.0.attention.attention.query", "vit.encoder.layer.0.attention.output.dense.bias"
    old = {f"{query}.weight": query, bias: bias, "classifier.weight": "classifier.weight"}
    new = {name: newer_names([module], config)[module] for name, module in old.items()}
    assert (is_newer(new, config), is_newer(old, config)) == (True, False)
    assert is_newer({"classifier.weight": "classifier"}, config) is None
    assert in_series_of(new, old, config) == old == in_series_of(old, old, config)
    assert in_series_of(old, new, config) == new == in_series_of(new, new, config)
    assert in_series_of(new, {}, config) == new
