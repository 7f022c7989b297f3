import numpy as np
import pytest
from checkpoint_builders import (
    clip_model,
    flax_vision_tree,
    t5_model,
    vision_tower,
    write_flax,
    write_safetensors,
)

import nufilt_jax as nj
from nufilt_jax.checkpoints import fit, open_checkpoint
from nufilt_jax.methods.selection import select

Q = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"
FC2 = "vision_model.encoder.layers.0.mlp.fc2.weight"
TOUCHED = (Q, FC1, FC2)


def lines(tmp_path, base, task, touched=TOUCHED, *, notices=False, **config):
    base = base if not isinstance(base, dict) else write_safetensors(tmp_path / "base", base, **config)
    task = task if not isinstance(task, dict) else write_safetensors(tmp_path / "task", task, **config)
    found = fit(open_checkpoint(str(base), role="base"), open_checkpoint(str(task)), touched)
    assert found.problems or not notices or found.notices
    return [str(line).replace(f"{tmp_path}/", "") for line in (found.notices if notices else found.problems)]


@pytest.mark.parametrize("base_form", ["clip", "vision", "5.x", "flax"])
@pytest.mark.parametrize("task_form", ["vision", "5.x", "flax", "bfloat16"])
def test_all_spellings_and_float_types_of_one_tower_fit(tmp_path, base_form, task_form):
    forms = {
        "clip": clip_model(),
        "vision": vision_tower(),
        "5.x": vision_tower(prefix=""),
        "flax": write_flax(tmp_path / "flax", flax_vision_tree(vision_tower())),
        "bfloat16": vision_tower(dtype="bfloat16"),
    }
    assert lines(tmp_path, forms[base_form], forms[task_form]) == []


def test_a_task_may_lack_what_is_not_touched_and_hold_integer_buffers(tmp_path):
    task = {name: vision_tower()[name] for name in TOUCHED}
    task["vision_model.embeddings.position_ids"] = np.arange(5)
    assert lines(tmp_path, clip_model(), task) == []


def test_shapes_are_compared_in_one_orientation(tmp_path):
    task = vision_tower()
    task[FC1] = np.zeros((5, 4), np.float32)
    expected = "has shape [5, 4], but [6, 4] in the base base (all models must be fine-tuned from this base;"
    [line] = lines(tmp_path, vision_tower(), task)
    assert line.startswith(f"task/model.safetensors: {FC1}: ") and expected in line
    [line] = lines(tmp_path, vision_tower(), write_flax(tmp_path / "flax", flax_vision_tree(task)))
    assert line.startswith("flax/flax_model.msgpack: vision_model/encoder/layers/0/mlp/fc1/kernel: ")
    assert expected in line


def test_a_touched_tensor_must_be_in_both_and_float(tmp_path):
    task = vision_tower(prefix="")
    del task["encoder.layers.0.mlp.fc1.weight"]
    task["encoder.layers.0.mlp.fc2.weight"] = np.zeros((4, 6), np.int8)
    found = lines(tmp_path, vision_tower(prefix=""), task, (*TOUCHED, "ghost"))
    assert found[0].startswith("base: ghost: is not in the base (exclude it with --layers)")
    assert found[1].startswith("task: encoder.layers.0.mlp.fc1.weight: is missing, but the base base has it")
    assert found[2].startswith("task/model.safetensors: encoder.layers.0.mlp.fc2.weight: holds I8, but only BF16")
    assert ", but only BF16, F16, F32, F64 can be merged (dequantize the model, or exclude it" in found[2]
    assert len(found) == 3


def test_what_the_base_has_no_place_for_is_named_or_summed_up(tmp_path):
    task = clip_model() | {
        "classifier.weight": np.zeros((2, 4), np.float32),
        "classifier.bias": np.zeros(2, "f"),
    }
    found = lines(tmp_path, vision_tower(), task)
    assert [line.split(": is not in the base base")[0] for line in found] == [
        "task: logit_scale",
        "task: text_model.* (4 tensors)",
        "task: text_projection.weight",
        "task: visual_projection.weight",
    ]
    assert "; the first is text_model.embeddings.token_embedding.weight (save the task" in found[1]
    alone = {name: x for name, x in task.items() if not name.startswith(("text_", "visual_", "logit"))}
    [line] = lines(tmp_path, vision_tower(), alone, notices=True)
    assert line.startswith("task: 2 tensors are not merged and stay the base's: classifier.bias (the base has none)")


def test_another_architecture_is_few_lines(tmp_path):
    layers = [f"encoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(30)]
    base = {name: np.zeros((2, 2), np.float32) for name in layers}
    found = lines(tmp_path, base, vision_tower(), layers)
    assert [line.split(": ")[1] for line in found] == [
        "encoder.block.* (30 tensors)",
        "vision_model.* (10 tensors)",
    ]


@pytest.mark.parametrize("base_copies", [(), ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")])
@pytest.mark.parametrize("task_copies", [(), ("encoder.embed_tokens.weight",)])
def test_tied_copies_may_be_stored_or_not(tmp_path, base_copies, task_copies):
    base, task = t5_model(tied_copies=base_copies), t5_model(seed=1, tied_copies=task_copies)
    assert lines(tmp_path, base, task, ["shared.weight", "lm_head.weight"], model_type="t5") == []


def test_a_head_of_its_own_is_refused_where_the_base_ties_it(tmp_path):
    base = t5_model(tied_copies=("lm_head.weight",), head=False)
    [line] = lines(tmp_path, base, t5_model(), ["shared.weight"], model_type="t5")
    assert line.startswith("task/model.safetensors: lm_head.weight: differs from shared.weight, but the base")


def test_a_tied_head_fits_though_the_task_has_no_config(tmp_path):
    base = t5_model(tied_copies=("lm_head.weight",), head=False)
    base = write_safetensors(tmp_path / "base", base, model_type="t5", tie_word_embeddings=True)
    task = t5_model(seed=3, tied_copies=("lm_head.weight",), head=False)
    task = write_safetensors(tmp_path / "task", task, model_type="t5", tie_word_embeddings=False)
    assert lines(tmp_path, base, task, ["shared.weight"]) == []


LAYER, FURTHER = "model.layers.0.mlp.up_proj.weight", ("mtp.layers.0.mlp.up_proj.weight", "mtp.norm.weight")
NUMBERED = ("model.layers.1.mlp.up_proj.weight", "model.layers.1.eh_proj.weight", "model.layers.1.enorm.weight")


@pytest.mark.parametrize("names", [FURTHER, NUMBERED], ids=["named", "numbered"])
def test_blocks_for_further_tokens_that_saving_drops_stay_the_bases(tmp_path, names):
    plain = {LAYER: np.ones((3, 2), np.float32)}
    whole = plain | {name: np.ones((2, 2), np.float32) for name in names}
    [line] = lines(tmp_path, whole, plain, (LAYER, names[0]), notices=True)
    assert line.startswith(
        f"task: 1 tensor is not merged and stays the base's: {names[0]} ([2, 2] in the base, none in"
    )
    [line] = lines(tmp_path, whole, plain, names[:1])
    assert line.startswith(f"task: {names[0]}: is missing, but the base")
    del whole[names[0]]  # which is no whole block
    [line] = lines(tmp_path, plain | {name: np.ones((2, 2), np.float32) for name in names}, whole, (LAYER, names[0]))
    assert "is missing" in line


GROWN = ("gpt_neox.embed_in", "backbone.embeddings", "transformer.w", "w", "entity_embeddings.entity_embeddings")


@pytest.mark.parametrize("name", [f"{table}.weight" for table in GROWN])
def test_a_grown_vocabulary_stays_the_bases_whatever_it_is_called(tmp_path, name):
    base, task = ({LAYER: np.ones((3, 2), "f"), name: np.ones((rows, 2), "f")} for rows in (5, 6))
    [line] = lines(tmp_path, base, task, (LAYER, name), notices=True)
    assert line.startswith(f"task: 1 tensor is not merged and stays the base's: {name} ([6, 2], [5, 2] in the base)")


def test_further_tokens_of_the_task_alone_are_left_out(tmp_path):
    plain = {LAYER: np.ones((3, 2), np.float32)}
    task = plain | {name: np.ones((2, 2), np.float32) for name in NUMBERED}
    [line] = lines(tmp_path, plain, task, (LAYER,), notices=True)
    assert line.startswith("task: 3 tensors are not merged")


BLOCK = {f"beit.encoder.layer.0.{part}.weight": np.ones((2, 2), "f") for part in ("query", "key", "value")}
LAST = {"layernorm.weight": np.ones(2, "f"), "layernorm.bias": np.ones(2, "f")}
POOLER = {f"beit.pooler.{name}": x for name, x in LAST.items()}
LM_HEAD, CLASSIFIER = {"lm_head.weight": np.ones((5, 2), "f")}, {"classifier.weight": np.ones((3, 2), "f")}


def test_the_norm_of_a_pooler_is_not_the_last_one_of_the_base(tmp_path):
    base, task = BLOCK | LAST | LM_HEAD, BLOCK | POOLER | CLASSIFIER
    [line] = lines(tmp_path, base, task, tuple(base), notices=True)
    assert line.startswith("task: 6 tensors are not merged and stay the base's: ")
    assert "layernorm.weight ([2] in the base, none in the task)" in line and "read with" not in line
    assert lines(tmp_path, base, task, tuple(base)) == []
    found = lines(tmp_path / "back", task, base, tuple(task))
    assert [line.split(": is not in the base")[0] for line in found] == [
        "task: layernorm.bias",
        "task: layernorm.weight",
    ]


def test_a_last_norm_that_nothing_takes_the_place_of_is_missing(tmp_path):
    found = lines(tmp_path, BLOCK | LAST, BLOCK | CLASSIFIER, tuple(BLOCK | LAST))
    assert [line.split(": is missing")[0] for line in found] == ["task: layernorm.weight", "task: layernorm.bias"]


@pytest.mark.parametrize("prefix", ["module.", "model."])
def test_a_prefix_of_a_part_with_blocks_is_taken_off_though_the_rest_fits(tmp_path, prefix):
    base = BLOCK | {f"blocks.{i}.fc.weight": np.ones((2, 2), "f") for i in range(2)}
    task = {prefix + name if name.startswith("blocks") else name: x for name, x in base.items()}
    [line] = lines(tmp_path, base, task, tuple(base), notices=True)
    assert line.startswith(f"task: 2 names begin with '{prefix}', which the base's do not: read without it")


def held(tensors, prefix):
    return {prefix + name: x for name, x in tensors.items()}


@pytest.mark.parametrize("base_form", ["vision_model.", ""])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "model._orig_mod."])
def test_a_tower_is_known_behind_a_prefix(tmp_path, prefix, base_form):
    task = held(vision_tower(prefix=""), prefix)
    first, *_ = lines(tmp_path, vision_tower(prefix=base_form), task, notices=True)
    assert first.startswith(
        f"task: {len(task)} names begin with '{prefix.removesuffix('_orig_mod.') or prefix}', which"
    )
    assert lines(tmp_path, vision_tower(prefix=base_form), task) == []


def test_a_class_position_is_of_its_tower():
    tower = {"class_pos_emb": np.ones((1, 2), "f"), **vision_tower(prefix="")}
    assert {name.partition(".")[0] for name in nj.canonical(tower)} == {"vision_model"}
    chosen = select(nj.canonical(tower), other_params="average")
    assert "vision_model.class_pos_emb" in chosen.other


def test_a_wrapped_base_is_a_tower_too(tmp_path):
    base = held(vision_tower(prefix=""), "module.")
    assert lines(tmp_path, base, vision_tower(), [f"module.{name}" for name in TOUCHED]) == []


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_wrappers_of_a_whole_model_hide_no_other_series(prefix):
    names = ("model.multi_modal_projector.linear_1.bias", "model.vision_tower.post_layernorm.bias", "lm_head.weight")
    found = nj.canonical({prefix + name: np.ones(2, "f") for name in names})
    assert {*found} == {
        f"{prefix}multi_modal_projector.linear_1.bias",
        f"{prefix}vision_tower.vision_model.post_layernorm.bias",
        f"{prefix}language_model.lm_head.weight",
    }


HELD = {
    "llama": ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"),
    "qwen2-vl": ("model.layers.0.mlp.up_proj.weight", "visual.blocks.0.mlp.fc1.weight", "lm_head.weight"),
    "bart": ("model.encoder.layers.0.fc1.weight", "model.shared.weight", "classification_head.dense.weight"),
}


@pytest.mark.parametrize("prefix", ["model.", "module.model."])
@pytest.mark.parametrize("kind", HELD)
def test_what_holds_a_model_may_be_called_as_a_part_of_it(tmp_path, kind, prefix):
    base = {name: np.full((3, 2), i, "f") for i, name in enumerate(HELD[kind])}
    [line] = lines(tmp_path, base, held(base, prefix), HELD[kind], notices=True)
    assert line.startswith(f"task: 3 names begin with '{prefix}' before the base's own names: read without it")
    models = open_checkpoint(str(tmp_path / "base"), role="base"), open_checkpoint(str(tmp_path / "task"))
    assert fit(*models, HELD[kind]).class_prefix == ""  # which an adapter taken from it has in its names


def test_a_body_keeps_the_prefix_that_belongs(tmp_path):
    base = {name: np.ones((3, 2), "f") for name in HELD["llama"]}
    body = {name: x for name, x in base.items() if name.startswith("model.")}
    found = lines(tmp_path, base, body, tuple(body))
    assert found == []
    del body["model.layers.1.mlp.up_proj.weight"]
    [line] = lines(tmp_path, base, body, HELD["llama"][:2])
    assert line.startswith("task: model.layers.1.mlp.up_proj.weight: is missing, but the base base has it")


def test_what_pretraining_alone_needs_stays_the_bases(tmp_path):
    base = BLOCK | {
        "swin.embeddings.mask_token": np.ones((1, 1, 2), "f"),
        "decoder.0.weight": np.ones((3, 2, 1, 1), "f"),
    }
    [line] = lines(tmp_path, base, BLOCK, tuple(base), notices=True)
    assert line.startswith(
        "task: 2 tensors are not merged and stay the base's: swin.embeddings.mask_token ([1, 1, 2] in"
    )
    assert lines(tmp_path, base, BLOCK, tuple(base)) == []
    stack = BLOCK | {"decoder.layers.0.fc.weight": np.ones((2, 2), "f"), "decoder.norm.weight": np.ones(2, "f")}
    assert len(lines(tmp_path, stack, BLOCK, tuple(stack))) == 2


WITHOUT_LORA = {f"model.layers.{i}.{part}_proj.weight": np.ones((2, 2), "f") for i in range(2) for part in "qkv"}


def test_a_full_model_with_lora_that_is_not_merged_is_told(tmp_path):
    task = {name.replace(".weight", ".base_layer.weight"): x for name, x in WITHOUT_LORA.items()}
    task |= {name.replace(".weight", ".lora_A.default.weight"): x for name, x in WITHOUT_LORA.items()}
    missing, extra = lines(tmp_path, WITHOUT_LORA, task, tuple(WITHOUT_LORA))
    assert missing.startswith("task: model.layers.* (6 tensors): is missing, but the base base has it; the first is ")
    assert "; the first is model.layers.0.q_proj.weight (its LoRA is not merged into it: save the task after" in missing
    assert extra.startswith("task: model.layers.* (12 tensors): is not in the base base; the first is ")
    assert "model.layers.0.k_proj.base_layer.weight (its LoRA is not merged into it: save the task after merge" in extra
