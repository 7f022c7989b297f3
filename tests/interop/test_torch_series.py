"""Adapters of models whose modules transformers 5 calls otherwise than it saves them: read, and loaded by peft."""

import json

import peft
import pytest
import torch
import transformers as T
from peft_helpers import assert_same, draw_factors, nufilt, weights
from safetensors import safe_open

from nufilt_jax.checkpoints import open_checkpoint, open_task
from nufilt_jax.checkpoints.newer_names import newer_names

# What peft and transformers say of each other's next versions is theirs.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
LAYERS = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = LAYERS | {"num_key_value_heads": 1, "vocab_size": 30, "pad_token_id": 0}
VISION = LAYERS | {"image_size": 16, "patch_size": 8}
ROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}
QWEN_VISION = {"depth": 1, "embed_dim": 24, "hidden_size": 24, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
QWEN2_5_VISION = {"depth": 1, "hidden_size": 24, "out_hidden_size": 24, "num_heads": 2, "intermediate_size": 40}
MLLAMA_VISION = VISION | {
    "num_global_layers": 1,
    "attention_heads": 2,
    "vision_output_dim": 48,
    "supported_aspect_ratios": [[1, 1]],
    "intermediate_layers_indices": [0],
    "max_num_tiles": 1,
}
MAE = VISION | {
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 40,
}
SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 8,
}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
LLAVA = {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION | {"model_type": "clip_vision_model"}}
SIGLIP = VISION | {"model_type": "siglip_vision_model"}
MODELS = {
    "vit": lambda: T.ViTForImageClassification(T.ViTConfig(**VISION)),
    "vit without a head": lambda: T.ViTModel(T.ViTConfig(**VISION)),
    "deit": lambda: T.DeiTForImageClassificationWithTeacher(T.DeiTConfig(**VISION)),
    "beit": lambda: T.BeitForImageClassification(T.BeitConfig(**VISION)),
    "vit mae": lambda: T.ViTMAEForPreTraining(T.ViTMAEConfig(**MAE)),
    "vit msn": lambda: T.ViTMSNForImageClassification(T.ViTMSNConfig(**VISION)),
    "dinov2": lambda: T.Dinov2ForImageClassification(T.Dinov2Config(**VISION)),
    "dinov2 with registers": lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**VISION)),
    "swin": lambda: T.SwinForImageClassification(T.SwinConfig(**SWIN)),
    "segformer": lambda: T.SegformerForSemanticSegmentation(T.SegformerConfig(**SEGFORMER)),
    "qwen2 vl": lambda: T.Qwen2VLForConditionalGeneration(
        T.Qwen2VLConfig(text_config=TEXT | {"rope_parameters": ROPE}, vision_config=QWEN_VISION)
    ),
    "qwen2.5 vl": lambda: T.Qwen2_5_VLForConditionalGeneration(
        T.Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": ROPE}, vision_config=QWEN2_5_VISION)
    ),
    "llava": lambda: T.LlavaForConditionalGeneration(T.LlavaConfig(**LLAVA)),
    "llava without a head": lambda: T.LlavaModel(T.LlavaConfig(**LLAVA)),
    "gemma3": lambda: T.Gemma3ForConditionalGeneration(
        T.Gemma3Config(text_config=TEXT | {"head_dim": 8}, vision_config=SIGLIP, mm_tokens_per_image=4)
    ),
    "mllama": lambda: T.MllamaForConditionalGeneration(
        T.MllamaConfig(text_config=TEXT | {"cross_attention_layers": [1]}, vision_config=MLLAMA_VISION)
    ),
    "gpt neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**LAYERS, vocab_size=30)),
}
TARGETS = {"q_proj", "o_proj", "v_proj", "fc1", "fc2", "up_proj", "qkv", "query_key_value", "proj"}


@pytest.fixture(params=MODELS)
def base(request, tmp_path):
    """A model as a fine-tuning starts from it, saved."""
    torch.manual_seed(0)
    model = MODELS[request.param]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "base")
    return type(model), tmp_path / "base"


def trained(base, folder, seed):
    """An adapter as a training leaves it, and beside it the model that peft makes of it."""
    kind, path = base
    model = kind.from_pretrained(path)
    linear = [name for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)]
    targets = [name for name in linear if name.rpartition(".")[2] in TARGETS]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    draw_factors(adapted, seed)
    adapted.save_pretrained(folder)
    adapted.merge_and_unload().save_pretrained(f"{folder}-full")


def stored(folder):
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping


def test_names_are_those_of_the_class(base):
    """Of all tensors, whatever their kind."""
    kind, path = base
    newer = newer_names(stored(path), json.loads((path / "config.json").read_text()))
    assert {*newer.values()} <= {*kind.from_pretrained(path).state_dict()}


def test_peft_s_adapters_are_read(base, tmp_path):
    trained(base, tmp_path / "a", 1)
    given = ("--base", base[1], "--task", f"a={tmp_path / 'a'}", "--method", "sum", "--layers", r".*\.weight")
    nufilt("merge", *given, "--out", tmp_path / "out")
    assert_same(stored(tmp_path / "out"), stored(tmp_path / "a-full"), stored(base[1]))


def test_peft_loads_what_was_merged(base, tmp_path):
    """Into an adapter, in the names of the one that came in."""
    trained(base, tmp_path / "a", 1)
    given = ("--base", base[1], "--task", f"a={tmp_path / 'a'}", "--method", "sum", "--layers", r".*\.weight")
    nufilt("merge", *given, "--out", tmp_path / "out", "--output", "adapter")
    assert_loaded(base, tmp_path / "out", tmp_path / "a-full")


def test_peft_loads_what_was_extracted(base, tmp_path):
    """Of a fine-tune whose changes have the rank that is asked for: all of it comes back."""
    trained(base, tmp_path / "a", 1)
    out = tmp_path / "out"
    nufilt("extract", tmp_path / "a-full", "--base", base[1], "--rank", 4, "--layers", r".*\.weight", "--out", out)
    assert_loaded(base, out, tmp_path / "a-full")


MOE = LAYERS | {"num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": 30}
ROUTERS = {
    "mixtral": (lambda: T.MixtralForCausalLM(T.MixtralConfig(**MOE)), {"modules_to_save": ["gate"]}),
    "minimax": (lambda: T.MiniMaxForCausalLM(T.MiniMaxConfig(**MOE)), {"modules_to_save": ["gate"]}),
    "minimax m2": (
        lambda: T.MiniMaxM2ForCausalLM(T.MiniMaxM2Config(**MOE, head_dim=8)),
        {"modules_to_save": ["gate"]},
    ),
    "granite": (lambda: T.GraniteMoeForCausalLM(T.GraniteMoeConfig(**MOE)), {"modules_to_save": ["router"]}),
    "phimoe": (lambda: T.PhimoeForCausalLM(T.PhimoeConfig(**MOE)), {"modules_to_save": ["router"]}),
    "phimoe adapted": (lambda: T.PhimoeForCausalLM(T.PhimoeConfig(**MOE)), {"target_modules": ["q_proj", "router"]}),
}


@pytest.mark.parametrize("case", ROUTERS)
def test_routers_are_read_and_made(tmp_path, case):
    """Which alone of a mixture's modules are renamed one by one."""
    make, how = ROUTERS[case]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    base = type(model), tmp_path / "base"
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | how))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "a")
    adapted.merge_and_unload().save_pretrained(tmp_path / "a-full")
    given = ("--base", base[1], "--task", f"a={tmp_path / 'a'}", "--layers", r".*\.weight")
    for output in ("model", "adapter"):
        out = ("--out", tmp_path / output, "--output", output)
        nufilt("merge", *given, "--method", "task_arithmetic", "--method-args", "scale=1", *out)
    assert_same(stored(tmp_path / "model"), stored(tmp_path / "a-full"), stored(base[1]))
    assert_loaded(base, tmp_path / "adapter", tmp_path / "a-full")


def assert_loaded(base, adapter, full):
    """peft makes the same model of our adapter as of its own, and our reader too."""
    kind, path = base
    with_ours = peft.PeftModel.from_pretrained(kind.from_pretrained(path), adapter).merge_and_unload()
    assert_same(weights(with_ours), weights(kind.from_pretrained(full)), weights(kind.from_pretrained(path)))
    tensors = open_task(str(adapter), open_checkpoint(str(path), role="base")).read()
    assert_same(
        {name: tensors[canonical] for canonical, name in _stored_names(path).items()}, stored(full), stored(path)
    )


def _stored_names(path):
    return {name: info.stored_name for name, info in open_checkpoint(str(path), role="base").tensors.items()}
