"""Which tensors are layers, told by their names: those of many libraries and models."""

import pytest

from nufilt_jax import anatomy
from nufilt_jax.patterns import expression, patterns

LINEAR = [
    "model.layers.0.self_attn.qkv_proj.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.gate_up_proj.weight",
    "model.layers.0.per_layer_input_gate.weight",
    "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "model.layers.0.mlp.shared_expert.up_proj.weight",
    "transformer.h.11.attn.c_attn.weight",
    "blocks.0.attn.qkv.weight",
    "transformer.resblocks.0.attn.in_proj_weight",
    "swin.encoder.layers.0.blocks.1.attention.self.query.weight",
    "swin.encoder.layers.0.downsample.reduction.weight",
    "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight",
    "encoder.layer.0.attention.attention.query.weight",
    "model.decoder.layers.0.encoder_attn.k_proj.weight",
    "blocks.3.norm1.linear.weight",
    "model.layers.3.feed_forward.w2.weight",
    "backbone.layers.0.mixer.in_proj.weight",
    "mtp.layers.0.self_attn.q_proj.weight",
    "layer1.0.fc.weight",
    "model.embed_tokens_extend.audio_embed.encoder.encoders.3.self_attn.q_proj.weight",
    "model.audio_tower.conformer.0.ffw_layer_start.ffw_layer_1.weight",
    "perceiver.encoder.self_attends.0.mlp.dense1.weight",
    "model.projector.qformer.encoder.layer.0.attention.attention.key.weight",
]
NOT_LINEAR = [
    "model.embed_tokens.weight",
    "lm_head.weight",
    "bert.pooler.dense.weight",
    "visual_projection.weight",
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.block_sparse_moe.gate.weight",
    "model.layers.0.mlp.router.weight",
    "model.layers.0.block_sparse_moe.router.layer.weight",
    "model.language_model.layers.0.altup.modality_router.weight",
    "model.layers.0.mlp.router_gate.weight",
    "model.layers.0.mlp.gate.wg.weight",
    "model.layers.61.shared_head.head.weight",
    "model.layers.0.mlp.shared_expert_gate.weight",
    "model.layers.0.mlp.experts.gate_up_proj_bias",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table",
    "vision_encoder.layers.0.attn.rel_pos_h",
    "fine_acoustics.input_embeds_layers.3.weight",
    "model.layers.0.self_attn.compressor.ape",
    "layer.0.rel_attn.r_w_bias",
    "backbone.layers.0.mixer.A_log",
    "model.layers.0.self_attn.q_proj.weight_scale_inv",
    "vision_model.head.mlp.fc1.weight",
    "head.layers.0.weight",
    "model.projector.layers.0.weight",
]


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers_of_blocks(name):
    assert anatomy.is_linear(name, (4, 4))


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_tables_norms_routers_biases_and_heads_are_none(name):
    assert not anatomy.is_linear(name, (4, 4))


def test_three_axes_are_experts_by_name_alone():
    for name in ("layers.0.mlp.experts.down_proj", "layers.0.block_sparse_moe.input_linear.weight"):
        assert anatomy.layers_in(name, (2, 4, 4)) == (f"{name}[0]", f"{name}[1]")
    others = ("layers.0.mixer.conv1d.weight", "layer.0.rel_attn.q", "blocks.0.time_decay", "embeddings.cls_token")
    for name in others:
        assert anatomy.layers_in(name, (2, 4, 4)) == (name,) and not anatomy.is_linear(name, (2, 4, 4))


def test_convolutions_are_laid_flat_inside_blocks_if_asked():
    inside, outside = "stages.0.layers.0.dwconv.weight", "embeddings.patch_embeddings.projection.weight"
    assert anatomy.layers_in(inside, (8, 4, 3, 3)) == (inside,)
    [layer] = anatomy.layers_in(inside, (8, 4, 3, 3), flat=True)
    assert anatomy.layer_shape(layer, (8, 4, 3, 3)) == (8, 36) and anatomy.tensor_of(layer) == inside
    assert anatomy.layers_in(outside, (8, 3, 2, 2), flat=True) == (outside,)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (8,)),
        ("transformer.h.0.attn.bias", (1, 1, 4, 4)),
        ("transformer.h.0.attn.masked_bias", ()),
        ("embeddings.position_ids", (1, 5)),
    ],
)
def test_what_is_computed_is_a_buffer(name, shape):
    assert anatomy.is_buffer(name, shape)


def test_a_bias_is_no_mask():
    assert not anatomy.is_buffer("blocks.0.attn.bias", (4,))


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["vision_model.encoder.layers.0.mlp.fc2.weight", "text_model.embeddings.position_ids"], "clip"),
        (["vision_model.encoder.layers.0.mlp.fc2.weight", "vision_model.head.mlp.fc1.weight"], "other"),
        (["vision_model.encoder.layers.0.self_attn.qkv.weight"], "other"),
        (["vision_model.model.encoder.layers.0.mlp.fc1.weight", "text_model.model.layers.0.fc1.weight"], "other"),
        (
            ["vision_model.encoder.layer.0.output.dense.weight", "text_model.encoder.layer.0.output.dense.weight"],
            "other",
        ),
        (["vision_model.encoder.layers.0.mlp.fc1.weight", "language_model.layers.0.mlp.up_proj.weight"], "other"),
        (["vision_model.encoder.layers.0.mlp.fc1.weight", "text_decoder.bert.encoder.layer.0.x.weight"], "other"),
        (["vision_model.encoder.layers.0.mlp.fc1.weight", "classifier.weight"], "clip"),
        (["multi_modal_projector.linear_1.weight", "language_model.model.norm.weight"], "llava"),
        (["model.layers.0.mlp.up_proj.weight"], "other"),
    ],
)
def test_families_are_told_by_names(names, family):
    assert anatomy.family_of(names) == family


TABLES = ["gpt_neox.embed_in", "backbone.embeddings", "embeddings", "model.embed_tokens", "w", "transformer.w"]


@pytest.mark.parametrize("name", [*TABLES, "luke.entity_embeddings.entity_embeddings"])
def test_tables_with_a_row_for_each_token(name):
    assert anatomy.is_vocabulary(f"{name}.weight")
    assert not anatomy.is_vocabulary(f"{name}.position_embeddings.weight")
    assert not anatomy.is_vocabulary("h.0.gate.w.weight")


def test_patterns_keep_the_usual_order_and_fused_names_whole():
    names = [f"a.layers.{i}.attn.{part}_proj.weight" for i in range(3) for part in ("k", "o", "q", "v", "qkv")]
    assert [(g.pattern, g.kinds, len(g.names)) for g in patterns(names)] == [
        ("a.layers.*.attn.{q,k,v,o}_proj", 4, 12),
        ("a.layers.*.attn.qkv_proj", 1, 3),
    ]
    experts = patterns(f"layers.{i}.experts.down_proj[{j}]" for i in range(2) for j in range(4))
    assert [g.pattern for g in experts] == ["layers.*.experts.down_proj[*]"]


def test_an_expression_finds_what_it_is_derived_from():
    import re

    names = [f"net.{i}.{part}.weight" for i in range(2) for part in ("fc1", "fc2")]
    found = re.compile(expression(patterns(names)))
    assert all(found.search(name) for name in names) and not found.search("net.head.weight")


PRETRAINING = [
    "decoder.bias",
    "decoder.0.weight",
    "swin.embeddings.mask_token",
    "embeddings.mask_token",
    "project_hid.weight",
    "project_q.bias",
    "quantizer.codevectors",
    "quantizer.weight_proj.weight",
    "pred_layer.proj.bias",
    "lm_loss.weight",
]
STACKS = [
    "decoder.final_layer_norm.weight",
    "decoder.embed_tokens.weight",
    "model.decoder.layernorm_embedding.weight",
    "decoder.block.0.layer.0.layer_norm.weight",
    "model.decoder.layers.0.fc1.bias",
    "quantizer.layers.0.codebook.embed",
    "quantizer.layers.0.input_proj.weight",
]


@pytest.mark.parametrize(("names", "is_head"), [(PRETRAINING, True), (STACKS, False)])
def test_heads_of_pretraining_are_no_stacks(names, is_head):
    assert {name: anatomy.is_head(name) for name in names} == dict.fromkeys(names, is_head)
