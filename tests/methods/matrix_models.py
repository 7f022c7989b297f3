"""Small models of every kind of tensor, around a base of zeros: a model is its own task vector."""

import numpy as np

from nufilt_jax import methods

Q = "vision_model.encoder.layers.{}.self_attn.q_proj.weight"
FC1 = "vision_model.encoder.layers.{}.mlp.fc1.weight"
FC2 = "vision_model.encoder.layers.{}.mlp.fc2.weight"
BIAS = "vision_model.encoder.layers.0.mlp.fc2.bias"
POSITION = "vision_model.embeddings.position_embedding.weight"
CLASS = "vision_model.embeddings.class_embedding"
PATCH = "vision_model.embeddings.patch_embedding.weight"
ROW = "vision_model.pooling.weight"
TOWER = {
    **{Q.format(i): (12, 12) for i in range(2)},
    **{FC1.format(i): (19, 12) for i in range(2)},
    FC2.format(0): (12, 19),
    POSITION: (2, 12),  # more than four times as wide as tall
    ROW: (1, 12),
    CLASS: (12,),
    BIAS: (12,),
    PATCH: (12, 3, 2, 2),
}
TOWER_LINEAR = {Q.format(0), Q.format(1), FC1.format(0), FC1.format(1), FC2.format(0), ROW}

SHARED, HEAD = "shared.weight", "lm_head.weight"  # of one shape, so of one stack; the first is no linear weight
RELATIVE = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
T5_Q = "encoder.block.0.layer.0.SelfAttention.q.weight"
T5_NORM = "encoder.block.0.layer.0.layer_norm.weight"
T5 = {SHARED: (40, 8), HEAD: (40, 8), RELATIVE: (8, 2), T5_Q: (8, 8), T5_NORM: (8,)}
T5_LINEAR = {HEAD, T5_Q}


def draw(shapes, seed, scale=1e-2):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def low_rank(shape, rank, seed, scale=1e-2):
    """As from a LoRA adapter."""
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))).astype(np.float32)


def orthogonal(n, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0].astype(np.float32)


def states(config, tasks, **options):
    """The merge after every task, by the rule that `config` belongs to."""
    [name] = [name for name, rule in methods.RULES.items() if rule.config is type(config)]
    rule = methods.get(name, config, **options)
    state = rule.init({name: np.zeros_like(x) for name, x in tasks[0].items()})
    result = []
    for task in tasks:
        state = rule.update(state, task)
        result.append(state)
    return result


def merged(config, *tasks):
    """D after the last task."""
    return {name: np.asarray(x) for name, x in states(config, tasks)[-1].delta.items()}


def of_one(*tensors):
    """Models of a single linear weight."""
    return [{Q.format(0): x} for x in tensors]


def merged_one(config, *tensors):
    """D of such models after the last task."""
    return merged(config, *of_one(*tensors))[Q.format(0)]


def relative_error(got, wanted):
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
