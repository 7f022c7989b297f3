"""A small vision tower with something of every kind of tensor, tasks fine-tuned from it, and merges by any rule."""

import jax.numpy as jnp
import numpy as np

from nufilt_jax import methods
from nufilt_jax.methods.adapter_only import AdapterOnlyConfig
from nufilt_jax.methods.nufilt import NufiltConfig
from nufilt_jax.methods.null_space import NullSpaceConfig
from nufilt_jax.methods.task_arithmetic import TaskArithmeticConfig
from nufilt_jax.methods.wemoe import WemoeConfig

WIDTH, INNER, BLOCKS = 32, 64, 2
Q = "vision_model.encoder.layers.{}.self_attn.q_proj.weight"
FC1 = "vision_model.encoder.layers.{}.mlp.fc1.weight"
FC2 = "vision_model.encoder.layers.{}.mlp.fc2.weight"
BIAS = "vision_model.encoder.layers.{}.mlp.fc1.bias"
POSITION = "vision_model.embeddings.position_embedding.weight"
CLASS = "vision_model.embeddings.class_embedding"
PATCH = "vision_model.embeddings.patch_embedding.weight"
NORM = "vision_model.encoder.layers.0.layer_norm1.weight"
RANKS = {"filter_rank": 8, "adapter_rank": 4, "task_rank": 3}
CONFIGS = {
    "nufilt": NufiltConfig(**RANKS, steps=10),
    "null_space": NullSpaceConfig(filter_rank=8),
    "adapter_only": AdapterOnlyConfig(**RANKS, steps=10),
    "task_arithmetic": TaskArithmeticConfig(scale=0.4),
    "wemoe": WemoeConfig(first_rank=4, later_rank=2),
}


def tower_shapes():
    shapes = {POSITION: (5, WIDTH), CLASS: (WIDTH,), PATCH: (WIDTH, 3, 2, 2), NORM: (WIDTH,)}
    for i in range(BLOCKS):
        for part in ("q", "k", "v", "out"):
            stem = f"vision_model.encoder.layers.{i}.self_attn.{part}_proj"
            shapes |= {f"{stem}.weight": (WIDTH, WIDTH), f"{stem}.bias": (WIDTH,)}
        shapes |= {FC1.format(i): (INNER, WIDTH), FC2.format(i): (WIDTH, INNER), BIAS.format(i): (INNER,)}
    return shapes


SELECTED = [name for name in tower_shapes() if name.endswith(("_proj.weight", "fc1.weight"))]


def model(seed, base=None, scale=0.05):
    """A vision tower of two blocks; near `base` if given."""
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in tower_shapes().items()}
    if base is not None:
        params = {name: base[name] + np.float32(scale) * x for name, x in params.items()}
    return params | {"vision_model.embeddings.position_ids": np.arange(5)[None]}


BASE = model(0)
TASKS = [model(seed, BASE) for seed in (1, 2, 3)]


def forward(params, batch):
    """Not a tower, but of all its parameters that a rule may train on: logits of four classes."""
    hidden = jnp.matmul(batch["x"], params[Q.format(0)].T)
    hidden = hidden + sum(jnp.tanh(jnp.mean(x)) for name, x in params.items() if x.dtype == jnp.float32)
    return hidden[:, :4]


def examples(name, n_steps=50):
    """Batches for the rules that learn from data; None for the others."""
    if not methods.RULES[name].needs_data:
        return None
    rng = np.random.default_rng(7)
    return methods.TaskData(
        iter([{"x": rng.normal(size=(16, WIDTH)).astype(np.float32)} for _ in range(n_steps)]), forward
    )


def rule_for(name, **options):
    return methods.get(name, CONFIGS.get(name), **options)


def update(rule_name, rule, state, task, **options):
    return rule.update(state, task, data=examples(rule_name), **options)


def merge(name, tasks=TASKS, base=BASE, **options):
    rule = rule_for(name, **options)
    state = rule.init(base)
    for task in tasks:
        state = update(name, rule, state, task)
    return state


def moved(state):
    """Names of the base's tensors that a merge has changed."""
    return {name for name, x in state.base.items() if not np.array_equal(x, state.merged[name])}


def change(params, function):
    """The floating tensors of a model, each replaced by `function(name, tensor)`."""
    return {name: function(name, x) if x.dtype == np.float32 else x for name, x in params.items()}
