"""Small whole CLIP models with a tokenizer, and data sets of images, as folders on disk."""

import io
import json

import datasets
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from nufilt_jax.models import canonical_shapes, parse_text_config, parse_vision_config, text_shapes

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# The alphabet, each letter inside and at the end of a word, then pairs that occur in the prompts.
MERGES = (("p", "h"), ("o", "f</w>"), ("r", "e"), ("re", "d</w>"), ("t", "o</w>"))
TOKENS = (*LETTERS, *(f"{letter}</w>" for letter in LETTERS), ".</w>", *("".join(pair) for pair in MERGES), START, END)
SIDE = 12
CONFIG = {
    "model_type": "clip",
    "projection_dim": 5,
    "vision_config": {
        "hidden_size": 8,
        "intermediate_size": 10,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 4,
    },
    "text_config": {
        "hidden_size": 6,
        "intermediate_size": 9,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "vocab_size": len(TOKENS),
        "max_position_embeddings": 40,
        "bos_token_id": TOKENS.index(START),
        "eos_token_id": TOKENS.index(END),
    },
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
PREPROCESSOR = {"size": SIDE, "crop_size": SIDE, "image_mean": MEAN, "image_std": STD}
CLASSES = ("red fox", "blue sea", "green leaf")


def params(seed=5):
    """Of a whole model, both towers and what joins them. What the tokens say weighs more than that they are there."""
    rng = np.random.default_rng(seed)
    shapes = canonical_shapes(parse_vision_config(CONFIG)) | text_shapes(parse_text_config(CONFIG))
    shapes |= {"visual_projection.weight": (5, 8), "text_projection.weight": (5, 6)}
    scales = {"v_proj.weight": 5, "out_proj.weight": 5, "q_proj.weight": 2, "k_proj.weight": 2}
    scales |= {"position_embedding.weight": 0.3, ".bias": 0.1, "pre_layrnorm.weight": 3}
    drawn = {name: rng.normal(0, 0.6, shape).astype(np.float32) for name, shape in shapes.items()}
    factors = {name: [scale for end, scale in scales.items() if name.endswith(end)] or [1] for name in drawn}
    return {name: np.float32(factors[name][0]) * value for name, value in drawn.items()}


def vision_half(whole):
    """What a fine-tuned checkpoint holds."""
    return {name: value for name, value in whole.items() if name.startswith("vision_model.")}


def write_tokenizer(folder):
    from transformers import CLIPTokenizer

    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    CLIPTokenizer(vocab=vocabulary, merges=list(MERGES), unk_token=END, pad_token=END).save_pretrained(folder)


def write_model(folder, tensors, config=CONFIG):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder)
    return folder


def images(n, seed=0):
    """Pictures of several shapes and modes, all of them smooth enough to survive resizing."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(n):
        size = tuple(rng.integers(9, 40, 2).tolist())
        small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        found.append(small.resize(size, Image.Resampling.BICUBIC).convert(("RGB", "L", "P", "RGBA")[index % 4]))
    return found


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write_data(folder, pictures, labels, *, classes=CLASSES, image="image", label="label", split="test"):
    """One parquet file, as the Hub's data sets are; `classes` None for labels that are numbers alone."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = datasets.Value("int64") if classes is None else datasets.ClassLabel(names=[*classes])
    rows = {image: [None if picture is None else png(picture) for picture in pictures], label: [*labels]}
    features = datasets.Features({image: datasets.Image(), label: kind})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000.parquet")
    return folder
