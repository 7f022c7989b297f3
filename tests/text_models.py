"""Small T5s with a tokenizer, and data sets of texts, as folders on disk."""

import json

import datasets
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = ("<pad>", "</s>", "<unk>")
WORDS = ("▁", "▁yes", "▁no", "▁maybe", "▁is", "▁cat", "▁dog", "▁red", "▁blue", "▁and", "?", *"12345.")
PIECES = (*SPECIAL, *WORDS)
CONFIG = {
    "model_type": "t5",
    "vocab_size": 24,  # more than the tokenizer has, as T5's embedding is padded too
    "d_model": 12,
    "d_kv": 5,
    "d_ff": 14,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def params(seed, favoured, base=None):
    """A model that answers with the favoured pieces alone; near `base` if there is one."""
    rng = np.random.default_rng(seed)
    width, inner, hidden = CONFIG["d_model"], CONFIG["num_heads"] * CONFIG["d_kv"], CONFIG["d_ff"]
    shapes = {"shared.weight": (CONFIG["vocab_size"], width)}
    for stack, attentions in (("encoder", ["SelfAttention"]), ("decoder", ["SelfAttention", "EncDecAttention"])):
        layer = f"{stack}.block.0.layer"
        for index, attention in enumerate(attentions):
            shapes |= {f"{layer}.{index}.{attention}.{part}.weight": (inner, width) for part in "qkv"}
            shapes[f"{layer}.{index}.{attention}.o.weight"] = (width, inner)
            shapes[f"{layer}.{index}.layer_norm.weight"] = (width,)
        shapes[f"{layer}.0.SelfAttention.relative_attention_bias.weight"] = (8, 2)
        last = f"{layer}.{len(attentions)}"
        shapes |= {f"{last}.DenseReluDense.{name}.weight": (hidden, width) for name in ("wi_0", "wi_1")}
        shapes[f"{last}.DenseReluDense.wo.weight"] = (width, hidden)
        shapes |= {f"{last}.layer_norm.weight": (width,), f"{stack}.final_layer_norm.weight": (width,)}
    result = {name: np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.5, shape) for name, shape in shapes.items()}
    result["shared.weight"] *= 2
    for part in "vo":  # what the question says weighs more than the answer so far
        result[f"decoder.block.0.layer.1.EncDecAttention.{part}.weight"] *= 3
    head = np.zeros((CONFIG["vocab_size"], width))
    rows = [PIECES.index(piece) for piece in favoured]
    head[rows] = rng.normal(0, 1, (len(rows), width))
    result["lm_head.weight"] = head
    if base is not None:
        result = {name: base[name] + 0.3 * x for name, x in result.items()}
    return {name: np.asarray(x, np.float32) for name, x in result.items()}


def write_tokenizer(folder):
    """As Flan-T5's: pieces with scores, the end token behind every text."""
    vocabulary = [(piece, 0.0 if piece in SPECIAL else -1.0) for piece in PIECES]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"extra_ids": 0, "model_max_length": 512}))
    return tokenizer


def write_model(folder, tensors, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder)
    return folder


def write_data(folder, columns, *, classes=None, split="validation"):
    """A data set with one split."""
    kinds = {name: datasets.Value("string") for name in columns}
    kinds["label"] = datasets.Value("float32") if classes is None else datasets.ClassLabel(names=classes)
    folder.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_dict(columns, datasets.Features(kinds))
    data.to_parquet(folder / f"{split}.parquet")
    return folder


def sentences(n, seed, longest=25):
    """Texts of 1 to `longest` words. Of 25 words, two fill up to 64 tokens."""
    rng = np.random.default_rng(seed)
    words = ["yes", "no", "cat", "dog", "red", "blue"]
    return [" ".join(rng.choice(words, size=size)) for size in rng.integers(1, longest + 1, n)]
