"""Adapters that peft saved are merged, and peft loads ours: the weights of both ways are the same."""

import json

import numpy as np
import peft
import pytest
import torch
from peft_helpers import assert_same, draw_factors, nufilt, weights
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

# What peft and transformers say of each other's next versions is theirs.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
RANKS = ("--filter-rank", "3", "--adapter-rank", "2", "--task-rank", "2", "--steps", "4")


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, num_key_value_heads=3, **sizes))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=9, n_embd=24, n_layer=2, n_head=3))


ATTENTION = {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 6}
ADAPTERS = {
    "plain": ATTENTION,
    "stabilised": ATTENTION | {"r": 3, "use_rslora": True, "target_modules": r".*\.(q_proj|up_proj)"},
    "patterns": ATTENTION | {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 5}},
    "some layers": ATTENTION | {"layers_to_transform": [1]},
}
CONV1D = {"target_modules": ["c_attn", "c_proj"], "r": 2, "lora_alpha": 4, "fan_in_fan_out": True}


def trained(model, folder, seed, **settings):
    """An adapter as a training leaves it, with every number drawn, saved by peft; and the merged weights."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    draw_factors(adapted, seed)
    adapted.save_pretrained(folder)
    return weights(adapted.merge_and_unload())


def drawn(adapted, folder, seed):
    """Saved by peft with every trained number moved; and the merged weights."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return weights(adapted.merge_and_unload())


@pytest.mark.parametrize("case", ADAPTERS)
def test_peft_s_adapters_are_read(tmp_path, case):
    """`sum` of one task is the model that peft makes of it."""
    llama().save_pretrained(tmp_path / "base")
    theirs = trained(llama(), tmp_path / "a", 1, **ADAPTERS[case])
    given = ("--base", tmp_path / "base", "--task", f"a={tmp_path / 'a'}", "--out", tmp_path / "out")
    nufilt("merge", *given, "--method", "sum")
    ours = weights(LlamaForCausalLM.from_pretrained(tmp_path / "out"))
    assert_same(ours, theirs, weights(llama()))


@pytest.mark.parametrize("options", [RANKS, ("--solver", "closed_form", "--filter-rank", "3", "--task-rank", "2")])
def test_peft_loads_what_was_merged(tmp_path, options):
    """Our adapter put onto the base by peft is the model that we write whole."""
    llama().save_pretrained(tmp_path / "base")
    for seed, case in enumerate(("plain", "stabilised")):
        trained(llama(), tmp_path / case, seed, **ADAPTERS[case])
    tasks = [part for case in ("plain", "stabilised") for part in ("--task", f"{case}={tmp_path / case}")]
    given = ("--base", tmp_path / "base", *tasks, *options)
    nufilt("merge", *given, "--out", tmp_path / "model")
    nufilt("merge", *given, "--out", tmp_path / "adapter", "--output", "adapter")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with_ours = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    ours = weights(with_ours.merge_and_unload())
    assert_same(ours, weights(LlamaForCausalLM.from_pretrained(tmp_path / "model")), weights(llama()))


def test_conv1d_both_ways(tmp_path):
    """GPT-2 keeps its weights turned: what peft saved comes in, and goes out again."""
    gpt2().save_pretrained(tmp_path / "base")
    theirs = trained(gpt2(), tmp_path / "a", 1, **CONV1D)
    given = ("--base", tmp_path / "base", "--task", f"a={tmp_path / 'a'}", "--method", "sum")
    nufilt("merge", *given, "--out", tmp_path / "model")
    nufilt("merge", *given, "--out", tmp_path / "adapter", "--output", "adapter")
    assert_same(weights(GPT2LMHeadModel.from_pretrained(tmp_path / "model")), theirs, weights(gpt2()))
    with_ours = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "adapter")
    assert_same(weights(with_ours.merge_and_unload()), theirs, weights(gpt2()))


def test_biases_and_whole_modules(tmp_path):
    """What an adapter holds whole is merged by the methods that touch all tensors, and goes out whole."""
    gpt2().save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(gpt2(), peft.LoraConfig(bias="lora_only", modules_to_save=["ln_f"], **CONV1D))
    theirs = drawn(adapted, tmp_path / "a", 1)
    given = ("--base", tmp_path / "base", "--task", f"a={tmp_path / 'a'}", "--method", "weight_average")
    nufilt("merge", *given, "--out", tmp_path / "model")
    nufilt("merge", *given, "--out", tmp_path / "adapter", "--output", "adapter")
    assert_same(weights(GPT2LMHeadModel.from_pretrained(tmp_path / "model")), theirs, weights(gpt2()))
    with_ours = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "adapter")
    assert_same(weights(with_ours.merge_and_unload()), theirs, weights(gpt2()))


def test_a_module_saved_whole_comes_out_with_all_that_it_has(tmp_path):
    """Its bias too, though no rule for selected layers touches that; a Conv1D's weight lies as its class has it."""
    gpt2().save_pretrained(tmp_path / "base")
    settings = CONV1D | {"target_modules": ["c_attn"]}
    for seed in (1, 2):
        adapted = peft.get_peft_model(gpt2(), peft.LoraConfig(modules_to_save=["c_fc"], **settings))
        drawn(adapted, tmp_path / f"a{seed}", seed)
    tasks = [part for seed in (1, 2) for part in ("--task", f"a{seed}={tmp_path / f'a{seed}'}")]
    given = ("--base", tmp_path / "base", *tasks, *RANKS)
    nufilt("merge", *given, "--out", tmp_path / "model", "--output", "model")
    nufilt("merge", *given, "--out", tmp_path / "adapter", "--output", "adapter")
    nufilt("verify", tmp_path / "adapter")
    ours = weights(peft.PeftModel.from_pretrained(gpt2(), tmp_path / "adapter").merge_and_unload())
    whole = weights(GPT2LMHeadModel.from_pretrained(tmp_path / "model"))
    assert_same(ours, whole, weights(gpt2()))
    moved = np.abs(whole["transformer.h.0.mlp.c_fc.weight"] - weights(gpt2())["transformer.h.0.mlp.c_fc.weight"])
    assert np.max(moved) > 0.1


@pytest.mark.parametrize("saved", [["embed_tokens"], ["embed_tokens", "lm_head"]], ids=["table", "both"])
def test_a_head_that_is_one_with_its_table_stays_so(tmp_path, saved):
    """peft loads the merged adapter as the merged model: there the two are modules of their own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = LlamaConfig(vocab_size=30, num_key_value_heads=3, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")

    def model(name="base"):
        return LlamaForCausalLM.from_pretrained(tmp_path / name)

    settings = peft.LoraConfig(**ATTENTION, modules_to_save=saved, ensure_weight_tying=len(saved) > 1)
    drawn(peft.get_peft_model(model(), settings), tmp_path / "a", 1)
    given = ("--base", tmp_path / "base", "--task", f"a={tmp_path / 'a'}", "--method", "weight_average")
    nufilt("merge", *given, "--out", tmp_path / "model")
    nufilt("merge", *given, "--out", tmp_path / "adapter", "--output", "adapter")
    with_ours = peft.PeftModel.from_pretrained(model(), tmp_path / "adapter")
    ours = {name.replace("modules_to_save.default.", ""): x for name, x in weights(with_ours).items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        wanted = weights(model("model"))[name]
        np.testing.assert_allclose(ours[f"base_model.model.{name}"], wanted, atol=1e-6, err_msg=name)
        assert np.max(np.abs(wanted - weights(model())[name])) > 0.1


def roberta():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=30, max_position_embeddings=12, **sizes))


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_classifier_s_adapters_are_read_and_made(tmp_path, bias):
    """For this type of task peft saves the head by itself, with `bias="all"` twice; the merge leaves it the base's."""
    roberta().save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["query", "value"], "r": 2, "bias": bias, "task_type": "SEQ_CLS"}
    theirs = [
        drawn(peft.get_peft_model(roberta(), peft.LoraConfig(**settings)), tmp_path / f"a{seed}", seed)
        for seed in (1, 2)
    ]
    one = ("--base", tmp_path / "base", "--task", f"a1={tmp_path / 'a1'}")
    nufilt("merge", *one, "--method", "weight_average", "--out", tmp_path / "one")
    assert_same(
        weights(RobertaForSequenceClassification.from_pretrained(tmp_path / "one")), theirs[0], weights(roberta())
    )
    two = (*one, "--task", f"a2={tmp_path / 'a2'}")
    for name, options in {"layers": RANKS, "all": ("--method", "weight_average")}.items():
        nufilt("merge", *two, *options, "--out", tmp_path / name, "--output", "model")
        nufilt("merge", *two, *options, "--out", tmp_path / f"{name}-adapter", "--output", "adapter")
        ours = weights(peft.PeftModel.from_pretrained(roberta(), tmp_path / f"{name}-adapter").merge_and_unload())
        whole = weights(RobertaForSequenceClassification.from_pretrained(tmp_path / name))
        assert_same(ours, whole, weights(roberta()))


def test_question_answering_s_adapters_are_made(tmp_path):
    """Of which peft saves the head as well."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 3}
    BertForQuestionAnswering(BertConfig(vocab_size=30, **sizes)).save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(target_modules=["query", "value"], r=2, task_type="QUESTION_ANS")

    def model(name="base"):
        return BertForQuestionAnswering.from_pretrained(tmp_path / name)

    drawn(peft.get_peft_model(model(), settings), tmp_path / "a", 1)
    given = ("--base", tmp_path / "base", "--task", f"a={tmp_path / 'a'}", "--method", "sum")
    nufilt("merge", *given, "--out", tmp_path / "model")
    nufilt("merge", *given, "--out", tmp_path / "adapter", "--output", "adapter")
    ours = weights(peft.PeftModel.from_pretrained(model(), tmp_path / "adapter").merge_and_unload())
    assert_same(ours, weights(model("model")), weights(model()))


def test_adapters_of_a_classifier_on_a_base_without_one_are_made(tmp_path):
    """Each has a head of its own, which the merge leaves out; so peft must not look for one."""
    roberta().roberta.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(target_modules=["query", "value"], r=2, task_type="SEQ_CLS")
    drawn(peft.get_peft_model(roberta(), settings), tmp_path / "a", 1)
    given = ("--base", tmp_path / "base", "--task", f"a={tmp_path / 'a'}", "--method", "sum")
    nufilt("merge", *given, "--out", tmp_path / "model")
    nufilt("merge", *given, "--out", tmp_path / "adapter", "--output", "adapter")
    ours = weights(peft.PeftModel.from_pretrained(roberta(), tmp_path / "adapter").merge_and_unload())
    whole = RobertaModel.from_pretrained(tmp_path / "model", add_pooling_layer=False)
    theirs = weights(roberta()) | {f"roberta.{name}": x for name, x in weights(whole).items()}
    assert_same(ours, theirs, weights(roberta()))


@pytest.mark.parametrize("base", [llama(), llama().model], ids=["whole", "headless"])
def test_peft_loads_what_was_extracted(tmp_path, base):
    """Of a fine-tune whose changes have the rank that is asked for: all of it comes back, on the fine-tune's class."""
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **ATTENTION))
    draw_factors(adapted)
    whole = adapted.merge_and_unload()
    whole.save_pretrained(tmp_path / "full")
    out = tmp_path / "adapter"
    nufilt("extract", tmp_path / "full", "--base", tmp_path / "base", "--rank", "4", "--out", out)
    assert json.loads((out / "extract.json").read_text())["kept"] > 0.999999
    with_ours = peft.PeftModel.from_pretrained(llama(), out)
    assert_same(weights(with_ours.merge_and_unload()), weights(whole), weights(llama()))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # which peft made itself
@pytest.mark.parametrize(
    ("rank", "arrays"), [(3, ("gate_up_proj", "down_proj")), (12, ("gate_up_proj", "down_proj")), (3, ("down_proj",))]
)
def test_peft_loads_experts_that_were_extracted(tmp_path, rank, arrays):
    """Of which one alone changed, maybe in one array, and which have fewer rows than the rank that is asked for."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_experts": 3, "num_experts_per_tok": 1, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 30}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).save_pretrained(tmp_path / "base")
    base, full = (Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2))
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            if name.endswith(("q_proj.weight", *arrays)):
                changed = parameter if parameter.dim() == 2 else parameter[1]
                changed.add_(0.2 * torch.randn(changed.shape[0], rank) @ torch.randn(rank, changed.shape[1]))
    full.save_pretrained(tmp_path / "full")
    out = tmp_path / "out"
    nufilt("extract", tmp_path / "full", "--base", tmp_path / "base", "--rank", rank, "--out", out)
    wanted = weights(base)
    assert_same(weights(peft.PeftModel.from_pretrained(base, out).merge_and_unload()), weights(full), wanted)
