"""Writes families.json: which tensors transformers stores for a tiny model of each family, and its config.json.

    python tests/architectures/record.py        # once with transformers 4.57, once with 5; each replaces its own half

Needs torch. Layouts that no installed library wrote are said in the file to be by hand.
"""

import json
import sys
import tempfile
from pathlib import Path

FILE = Path(__file__).with_name("families.json")
WIDTH, INNER, VOCAB = 32, 48, 64  # no two sides of a matrix alike, where an architecture leaves the choice

# Of decoders in the manner of Llama.
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
}
IMAGES = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_inner": INNER, "n_layer": 2, "n_head": 2, "n_positions": 16}
SEQUENCES = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": VOCAB} | {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in (("ffn_dim", INNER), ("attention_heads", 2))
}
EXPERTS = LLAMA | {"num_local_experts": 3, "num_experts_per_tok": 2}
QWEN_EXPERTS = LLAMA | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": INNER}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": WIDTH,
    "deepstack_visual_indexes": [0],
}
QWEN_ROTARY = {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True}}
T5 = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 16, "d_ff": INNER, "num_layers": 2, "num_heads": 2}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2}

# Family: (model class, config class, settings). Two classes of one family are two entries.
MODELS = {
    "bert": ("BertForSequenceClassification", "BertConfig", ENCODER),
    "bert_model": ("BertModel", "BertConfig", ENCODER),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", ENCODER),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "vocab_size": VOCAB,
            "dim": WIDTH,
            "hidden_dim": INNER,
            "n_layers": 2,
            "n_heads": 2,
            "max_position_embeddings": 16,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2_model": ("GPT2Model", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama_model": ("LlamaModel", "LlamaConfig", LLAMA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", LLAMA),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", EXPERTS),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", QWEN_EXPERTS),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", EXPERTS),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        EXPERTS | {"num_experts_per_tok": 1, "intermediate_size_mlp": INNER, "interleave_moe_layer_step": 2},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {"text_config": QWEN_EXPERTS | QWEN_ROTARY, "vision_config": QWEN_VISION},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", LLAMA),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGES),
    "vit_model": ("ViTModel", "ViTConfig", IMAGES),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", IMAGES | {"mlp_ratio": 2}),
    "swin": ("SwinForImageClassification", "SwinConfig", SWIN),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"num_stages": 2, "hidden_sizes": [16, WIDTH], "depths": [2, 2], "patch_size": 2, "image_size": 16},
    ),
    "siglip": ("SiglipModel", "SiglipConfig", {"text_config": ENCODER, "vision_config": IMAGES}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        SEQUENCES
        | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 10}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQUENCES | {"max_position_embeddings": 16}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5 | {"feed_forward_proj": "gated-gelu"}),
    "t5_relu": ("T5ForConditionalGeneration", "T5Config", T5),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": LLAMA | {"model_type": "llama"},
            "vision_config": IMAGES | {"model_type": "clip_vision_model"},
            "image_token_index": VOCAB - 1,
        },
    ),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": ENCODER, "vision_config": IMAGES, "projection_dim": 24}),
}
# What the classes of 5 hold in memory; `save_pretrained` writes these with one matrix per expert, unless asked not to.
IN_MEMORY = {"mixtral_stacked": "mixtral", "qwen3_moe_stacked": "qwen3_moe"}


def main() -> None:
    """Records what the installed transformers writes."""
    import transformers

    version = transformers.__version__
    series = "4.57" if version.startswith("4.57.") else version.split(".")[0]
    document = json.loads(FILE.read_text()) if FILE.exists() else {"versions": {}, "families": {}}
    document["versions"][series] = versions()
    for family in MODELS:
        document["families"].setdefault(family, {})[series] = recorded(*built(family))
    if series == "5":
        for family, source in IN_MEMORY.items():
            model, class_name = built(source)
            document["families"][family] = {series: recorded(model, class_name, save_original_format=False)}
    document["families"] |= by_hand(document["families"])
    FILE.write_text(as_text(document))
    sys.stdout.write(f"{FILE}: transformers {version}, {len(document['families'])} families\n")


def versions():
    """Of the libraries that decide."""
    import safetensors
    import torch
    import transformers

    return {module.__name__: module.__version__.split("+")[0] for module in (safetensors, torch, transformers)}


def built(family):
    """The tiny model, with random weights, and the name of its class."""
    import torch
    import transformers

    class_name, config_name, settings = MODELS[family]
    torch.manual_seed(0)
    return getattr(transformers, class_name)(getattr(transformers, config_name)(**settings)), class_name


def recorded(model, class_name, **options):
    """Class, config and stored tensors (dtype and shape by name) of what `save_pretrained` writes."""
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **options)
        config = json.loads((Path(folder) / "config.json").read_text())
        tensors = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no dict)
                    part = file.get_slice(name)
                    tensors[name] = [part.get_dtype(), part.get_shape()]
    return {"class": class_name, "config": config, "tensors": dict(sorted(tensors.items()))}


def by_hand(families):
    """Layouts of libraries that were not installed: timm's ViT, and the folder that sentence-transformers writes."""
    f32 = {name: ["F32", list(shape)] for name, shape in timm_shapes().items()}
    timm = {
        "by hand": "names of timm's VisionTransformer with qkv_bias, as its Hub folders hold them",
        "class": "VisionTransformer",
        "config": {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "num_features": WIDTH},
        "tensors": dict(sorted(f32.items())),
    }
    found = {"timm": {"any": timm}}
    for series, bert in families.get("bert_model", {}).items():
        note = "transformers' BertModel in the root, and beside it modules.json and 1_Pooling/config.json"
        found.setdefault("sentence_transformers", {})[series] = {"by hand": note} | bert
    return found


def timm_shapes():
    """timm/models/vision_transformer.py: one matrix for query, key and value."""
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 5, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 4, 4),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "head.weight": (5, WIDTH),
        "head.bias": (5,),
    }
    for block in range(2):
        stem = f"blocks.{block}."
        for name, d_out, d_in in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", INNER, WIDTH),
            ("mlp.fc2", WIDTH, INNER),
        ):
            shapes |= {f"{stem}{name}.weight": (d_out, d_in), f"{stem}{name}.bias": (d_out,)}
        shapes |= {f"{stem}{norm}.{leaf}": (WIDTH,) for norm in ("norm1", "norm2") for leaf in ("weight", "bias")}
    return shapes


def as_text(document):
    """JSON with a line for each tensor and each config."""
    lines = ["{", f'"versions": {json.dumps(document["versions"], sort_keys=True)},', '"families": {']
    for family, by_series in sorted(document["families"].items()):
        parts = []
        for series, entry in sorted(by_series.items()):
            rows = [f"   {json.dumps(name)}: {json.dumps(tensor)}" for name, tensor in entry["tensors"].items()]
            head = {key: value for key, value in entry.items() if key != "tensors"}
            body = ",\n".join(
                f"  {json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in head.items()
            )
            parts.append(f' "{series}": {{\n{body},\n  "tensors": {{\n' + ",\n".join(rows) + "\n  }\n }")
        lines.append(f"{json.dumps(family)}: {{\n" + ",\n".join(parts) + "\n},")
    lines[-1] = lines[-1].removesuffix(",")
    return "\n".join([*lines, "}", "}", ""])


if __name__ == "__main__":
    main()
