"""CLIP's vision forward in float64 NumPy, one image, head and token at a time.

Shares no code with the package.
"""

import math

import numpy as np


def layer_norm(x, weight, bias, eps):
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / math.sqrt(variance + eps) * weight + bias


def activate(x, name):
    if name == "quick_gelu":
        return x / (1 + np.exp(-1.702 * x))
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention(hidden, p, prefix, n_heads):
    query, key, value = (
        np.stack([p[f"{prefix}.{name}.weight"] @ token + p[f"{prefix}.{name}.bias"] for token in hidden])
        for name in ("q_proj", "k_proj", "v_proj")
    )
    size = hidden.shape[1] // n_heads
    mixed = np.zeros_like(hidden)
    for head in range(n_heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(hidden)):
            scores = np.array([query[i, part] @ key[j, part] / math.sqrt(size) for j in range(len(hidden))])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            for j, weight in enumerate(weights):
                mixed[i, part] += weight * value[j, part]
    return np.stack([p[f"{prefix}.out_proj.weight"] @ token + p[f"{prefix}.out_proj.bias"] for token in mixed])


def embed(image, p, config):
    size, side = config["patch_size"], config["image_size"] // config["patch_size"]
    tokens = [p["vision_model.embeddings.class_embedding"]]
    kernel = p["vision_model.embeddings.patch_embedding.weight"]
    for row in range(side):
        for column in range(side):
            patch = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            tokens.append(np.array([(patch * one).sum() for one in kernel]))
    return np.stack(tokens) + p["vision_model.embeddings.position_embedding.weight"]


def image_features(params, image, config):
    """Features of one image `[3, h, w]`; `config` is the vision tower's own."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    eps = config["layer_norm_eps"]

    def norm(tokens, name):
        return np.stack([layer_norm(t, p[f"{name}.weight"], p[f"{name}.bias"], eps) for t in tokens])

    hidden = norm(embed(image.astype(np.float64), p, config), "vision_model.pre_layrnorm")
    for index in range(config["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{index}"
        normed = norm(hidden, f"{layer}.layer_norm1")
        hidden = hidden + attention(normed, p, f"{layer}.self_attn", config["num_attention_heads"])
        for i, token in enumerate(norm(hidden, f"{layer}.layer_norm2")):
            inner = activate(p[f"{layer}.mlp.fc1.weight"] @ token + p[f"{layer}.mlp.fc1.bias"], config["hidden_act"])
            hidden[i] += p[f"{layer}.mlp.fc2.weight"] @ inner + p[f"{layer}.mlp.fc2.bias"]
    pooled = norm(hidden[:1], "vision_model.post_layernorm")[0]
    return p["visual_projection.weight"] @ pooled if "visual_projection.weight" in p else pooled
