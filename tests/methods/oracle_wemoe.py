"""LoRA-WEMoE once more: float64 NumPy, one token and one expert at a time."""

import numpy as np


def expert(tau, rank):
    """A = diag(σ_k) V_kᵀ and B = U_k of the best approximation of rank k."""
    u, s, vt = np.linalg.svd(np.asarray(tau, np.float64), full_matrices=False)
    a = np.stack([s[i] * vt[i] for i in range(min(rank, len(s)))] or [np.zeros(0)] * 0).reshape(-1, tau.shape[1])
    return a, u[:, : len(a)]


def gate_weights(weight, bias, hidden):
    """One number per expert: the gate's answers, averaged over tokens and then over the batch."""
    per_image = []
    for tokens in hidden:
        answers = [weight @ token + bias for token in tokens]
        per_image.append(sum(answers) / len(answers))
    return sum(per_image) / len(per_image)


def mixed(params, matrix, weights):
    """W + Σ w_i B_i A_i."""
    total = np.array(params[f"{matrix}.weight"], np.float64)
    for i, w in enumerate(weights):
        if f"{matrix}.experts.{i}.a" in params:
            total = total + w * params[f"{matrix}.experts.{i}.b"] @ params[f"{matrix}.experts.{i}.a"]
    return total


def block(params, name, hidden):
    """A feed-forward block with tanh; `hidden` is [images, tokens, d]."""
    weights = gate_weights(params[f"{name}.gate.weight"], params[f"{name}.gate.bias"], hidden)
    first, last = (mixed(params, f"{name}.{part}", weights) for part in ("fc1", "fc2"))
    return np.stack([np.stack([last @ np.tanh(first @ token) for token in tokens]) for tokens in hidden])


def logits(params, batch, blocks):
    """Attention-free blocks one after another; the mean token is the answer."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    hidden = np.asarray(batch, np.float64)
    for index in range(blocks):
        layer = f"vision_model.encoder.layers.{index}"
        hidden = hidden @ p[f"{layer}.self_attn.q_proj.weight"].T + p[f"{layer}.self_attn.q_proj.bias"]
        hidden = hidden + block(p, f"{layer}.mlp", hidden)
    return np.stack([sum(tokens) / len(tokens) for tokens in hidden])
