"""A CLIP vision tower with gated experts in float64 NumPy: block by block for a whole batch, token by token.

Shares no code with the package.
"""

import clip_reference as reference
import numpy as np


def batch_features(params, images, config):
    """Features of all images `[b, 3, h, w]` of one batch."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    eps = config["layer_norm_eps"]

    def norm(tokens, name):
        return np.stack([reference.layer_norm(t, p[f"{name}.weight"], p[f"{name}.bias"], eps) for t in tokens])

    batch = [norm(reference.embed(i.astype(np.float64), p, config), "vision_model.pre_layrnorm") for i in images]
    for index in range(config["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{index}"
        for j, hidden in enumerate(batch):
            seen = norm(hidden, f"{layer}.layer_norm1")
            batch[j] = hidden + reference.attention(seen, p, f"{layer}.self_attn", config["num_attention_heads"])
        normed = [norm(hidden, f"{layer}.layer_norm2") for hidden in batch]
        weights = gate_weights(p, f"{layer}.mlp", normed)
        fc1, fc2 = (mixed(p, f"{layer}.mlp.{part}", weights) for part in ("fc1", "fc2"))
        for hidden, tokens in zip(batch, normed, strict=True):
            for i, token in enumerate(tokens):
                inner = reference.activate(fc1 @ token + p[f"{layer}.mlp.fc1.bias"], config["hidden_act"])
                hidden[i] += fc2 @ inner + p[f"{layer}.mlp.fc2.bias"]
    return np.stack([norm(hidden[:1], "vision_model.post_layernorm")[0] for hidden in batch])


def gate_weights(p, block, batch):
    """The mean over tokens, then over images, of G h + g; nothing for a block without a gate."""
    if f"{block}.gate.weight" not in p:
        return []
    answers = [[p[f"{block}.gate.weight"] @ token + p[f"{block}.gate.bias"] for token in tokens] for tokens in batch]
    return sum(sum(rows) / len(rows) for rows in answers) / len(answers)


def mixed(p, matrix, weights):
    total = p[f"{matrix}.weight"].copy()
    for i, weight in enumerate(weights):
        if f"{matrix}.experts.{i}.a" in p:
            total += weight * p[f"{matrix}.experts.{i}.b"] @ p[f"{matrix}.experts.{i}.a"]
    return total
