"""CLIP's text forward in float64 NumPy, one text, head and token at a time.

Shares no code with the package.
"""

import math

import numpy as np
from clip_reference import activate, layer_norm


def attention(hidden, mask, p, prefix, n_heads):
    """Each token looks at itself and at those before it that are no padding."""
    query, key, value = (
        np.stack([p[f"{prefix}.{name}.weight"] @ token + p[f"{prefix}.{name}.bias"] for token in hidden])
        for name in ("q_proj", "k_proj", "v_proj")
    )
    size = hidden.shape[1] // n_heads
    mixed = np.zeros_like(hidden)
    for head in range(n_heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(hidden)):
            scores = {j: query[i, part] @ key[j, part] / math.sqrt(size) for j in range(i + 1) if mask[j]}
            total = sum(math.exp(score) for score in scores.values())
            for j, score in scores.items():
                mixed[i, part] += math.exp(score) / total * value[j, part]
    return np.stack([p[f"{prefix}.out_proj.weight"] @ token + p[f"{prefix}.out_proj.bias"] for token in mixed])


def text_features(params, ids, mask, config):
    """Features of one text; `config` is the text tower's own."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    eps = config["layer_norm_eps"]

    def norm(tokens, name):
        return np.stack([layer_norm(t, p[f"{name}.weight"], p[f"{name}.bias"], eps) for t in tokens])

    words = p["text_model.embeddings.token_embedding.weight"]
    places = p["text_model.embeddings.position_embedding.weight"]
    hidden = np.stack([words[token] + places[i] for i, token in enumerate(ids)])
    for index in range(config["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{index}"
        normed = norm(hidden, f"{layer}.layer_norm1")
        hidden = hidden + attention(normed, mask, p, f"{layer}.self_attn", config["num_attention_heads"])
        for i, token in enumerate(norm(hidden, f"{layer}.layer_norm2")):
            inner = activate(p[f"{layer}.mlp.fc1.weight"] @ token + p[f"{layer}.mlp.fc1.bias"], config["hidden_act"])
            hidden[i] += p[f"{layer}.mlp.fc2.weight"] @ inner + p[f"{layer}.mlp.fc2.bias"]
    # Configs of old files say 2 where they mean OpenAI's end token, the highest of all.
    end = max(ids) if config["eos_token_id"] == 2 else config["eos_token_id"]
    pooled = norm(hidden, "text_model.final_layer_norm")[list(ids).index(end)]
    return p["text_projection.weight"] @ pooled if "text_projection.weight" in p else pooled
