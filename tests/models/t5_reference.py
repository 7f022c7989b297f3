"""T5's forward in float64 NumPy, one text, head and token at a time; generation without a cache.

Shares no code with the package.
"""

import math

import numpy as np


def bucket(relative, bidirectional, n_buckets, max_distance):
    """The published definition, for one distance (key minus query)."""
    offset = 0
    if bidirectional:
        n_buckets = n_buckets // 2
        if relative > 0:
            offset = n_buckets
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = n_buckets // 2
    if distance < exact:
        return offset + distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    # 1e-9: a distance at a bound belongs to the bucket above it, however the logarithms round
    return offset + min(exact + math.floor(share * (n_buckets - exact) + 1e-9), n_buckets - 1)


def norm(x, weight, eps):
    return x / math.sqrt(sum(value * value for value in x) / len(x) + eps) * weight


def activate(x, kind):
    if kind == "relu":
        return np.maximum(x, 0)
    if kind == "gated-silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(p, prefix, hidden, seen, config, allowed, table=None, bidirectional=True):
    """Attention of every token of `hidden` to those of `seen` that `allowed(i, j)` lets it see."""
    query, key, value = (
        np.stack([p[f"{prefix}.{name}.weight"] @ token for token in states])
        for name, states in (("q", hidden), ("k", seen), ("v", seen))
    )
    size = config["d_kv"]
    mixed = np.zeros((len(hidden), config["num_heads"] * size))
    for head in range(config["num_heads"]):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(hidden)):
            scores = {}
            for j in range(len(seen)):
                if allowed(i, j):
                    scores[j] = query[i, part] @ key[j, part]
                    if table is not None:
                        n_buckets = config["relative_attention_num_buckets"]
                        max_distance = config["relative_attention_max_distance"]
                        scores[j] += table[bucket(j - i, bidirectional, n_buckets, max_distance), head]
            highest = max(scores.values())
            total = sum(math.exp(score - highest) for score in scores.values())
            for j, score in scores.items():
                mixed[i, part] += math.exp(score - highest) / total * value[j, part]
    return np.stack([p[f"{prefix}.o.weight"] @ token for token in mixed])


def feed_forward(p, prefix, x, kind):
    dense = f"{prefix}.DenseReluDense"
    if kind == "relu":
        return p[f"{dense}.wo.weight"] @ activate(p[f"{dense}.wi.weight"] @ x, kind)
    gate = activate(p[f"{dense}.wi_0.weight"] @ x, kind)
    return p[f"{dense}.wo.weight"] @ (gate * (p[f"{dense}.wi_1.weight"] @ x))


def stack(p, name, tokens, n_blocks, config, allowed, memory=None, memory_mask=None):
    hidden = np.stack([p["shared.weight"][token] for token in tokens])
    table = p[f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]

    def normed(states, prefix):
        weight = p[f"{prefix}.layer_norm.weight"]
        return np.stack([norm(token, weight, config["layer_norm_epsilon"]) for token in states])

    for index in range(n_blocks):
        layer = f"{name}.block.{index}.layer"
        states = normed(hidden, f"{layer}.0")
        bidirectional = memory is None
        hidden = hidden + attention(
            p, f"{layer}.0.SelfAttention", states, states, config, allowed, table, bidirectional
        )
        if memory is not None:
            states = normed(hidden, f"{layer}.1")
            hidden = hidden + attention(
                p, f"{layer}.1.EncDecAttention", states, memory, config, lambda i, j: memory_mask[j]
            )
        last = f"{layer}.{1 if memory is None else 2}"
        states = normed(hidden, last)
        hidden = hidden + np.stack([feed_forward(p, last, token, config["feed_forward_proj"]) for token in states])
    weight = p[f"{name}.final_layer_norm.weight"]
    return np.stack([norm(token, weight, config["layer_norm_epsilon"]) for token in hidden])


def logits(params, ids, mask, decoder_ids, config, *, scaled):
    """Logits of one text: `[decoder tokens, vocabulary]`."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    memory = stack(p, "encoder", ids, config["num_layers"], config, lambda i, j: mask[j])
    n_blocks = config["num_decoder_layers"]
    hidden = stack(p, "decoder", decoder_ids, n_blocks, config, lambda i, j: j <= i, memory, mask)
    head = p.get("lm_head.weight", p["shared.weight"])
    return np.stack([head @ (token / math.sqrt(config["d_model"]) if scaled else token) for token in hidden])


def generate(params, ids, mask, config, n_tokens, *, scaled):
    """The greedy continuation of one text, everything computed anew for each token."""
    tokens = [config["decoder_start_token_id"]]
    while len(tokens) <= n_tokens and config["eos_token_id"] not in tokens[1:]:
        tokens.append(int(np.argmax(logits(params, ids, mask, tokens, config, scaled=scaled)[-1])))
    return tokens[1:] + [config["pad_token_id"]] * (n_tokens + 1 - len(tokens))
