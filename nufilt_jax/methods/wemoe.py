"""LoRA-WEMoE: weight-ensembling experts (Tang et al., arXiv:2402.00433) of low rank, one more with every task.

The continual form is the baseline of Qiu et al., arXiv:2509.21413v2: attention by task arithmetic; of every
feed-forward matrix a frozen low-rank copy of τ, the expert; per block one linear gate, whose mean answer to a batch
weighs the experts.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from nufilt_jax.anatomy import ModelFamily
from nufilt_jax.core.adapt import standard_normal
from nufilt_jax.errors import Problem, SolveError, raise_all
from nufilt_jax.linalg.dense import thin_svd
from nufilt_jax.methods.adaptation import TRAINED_MODEL, LearningConfig, model_params, train_by_adam
from nufilt_jax.methods.elementwise import blend
from nufilt_jax.methods.matrices import each_layer, split
from nufilt_jax.methods.stacked import Params, Stacked, TaskVector, Tensor
from nufilt_jax.methods.starts import adapter_keys
from nufilt_jax.methods.state import Advance, Context, MergeState, Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class WemoeConfig(LearningConfig):
    """LoRA-WEMoE: attention by task arithmetic, feed-forward weights as gated low-rank experts.

    Attributes:
      scale: factor on the attention's task vectors, and start of the gates (Table 9).
      first_rank: r_l of the first task's experts (Table 9).
      later_rank: of all later ones. Table 9 says 64; the authors' program takes 16, and Table 5 counts so.
    """

    scale: float = 0.3
    first_rank: int = 64
    # ViT-B/32 after 8 tasks: 103.7 M parameters, as Table 5 says; with 64 throughout they would be 134.7 M.
    later_rank: int = 16


GATE_STD = 0.01  # of a new gate row's entries, in the authors' program

_TOUCHED = (
    r"vision_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj\.(weight|bias)|mlp\.fc[12]\.weight)",
    r"(encoder|decoder)\.block\.\d+\.layer\.\d+\.(Self|EncDec)Attention\.([qkvo]|relative_attention_bias)\.weight",
    r"(encoder|decoder)\.block\.\d+\.layer\.\d+\.DenseReluDense\.(wi|wi_0|wi_1|wo)\.weight",
)
# A block's first matrices take its input, its last one gives its output: both are as wide as the gate.
_FEED_FORWARD = re.compile(r"(?P<block>.+\.(mlp|DenseReluDense))\.((?P<first>fc1|wi|wi_0|wi_1)|fc2|wo)\.weight")


def attention_and_feed_forward(name: str, shape: tuple[int, ...], family: ModelFamily = "other") -> bool:
    """Attention, with CLIP's biases and T5's tables of relative positions, and the feed-forward matrices."""
    return any(re.fullmatch(pattern, name) for pattern in _TOUCHED)


def is_feed_forward(name: str, shape: tuple[int, ...] = ()) -> bool:
    """Whether a tensor gets experts instead of being merged."""
    return _FEED_FORWARD.fullmatch(name) is not None


def advance(state: MergeState, task: TaskVector, context: Context[WemoeConfig]) -> Advance:
    """Attention by task arithmetic, then one more expert and gate row, then all gates trained."""
    config = context.config
    delta, experts = grow(state, task, config)
    new = {name: experts[f"{expert_name(name, state.step)}.a"] for name in task if is_feed_forward(name)}
    broken = [name for name, factor in new.items() if not jnp.isfinite(factor).all()]
    fix = "fine-tune again, or exclude it with --layers"
    raise_all(SolveError, (Problem("task", "its singular values are not finite", fix, name) for name in broken))
    base = model_params(state.base)
    attention = {name: base[name] for name in delta if not is_feed_forward(name)}
    frozen = {**base, **_shifted(attention, delta), **experts}
    start = grow_gates(state, task, config, context.seed)
    gates, report = train_by_adam(_params, start, frozen, context, f"gates of {len(start) // 2} blocks")
    return Advance(delta, {TRAINED_MODEL: report}, added={**experts, **gates})


def _params(gates: Params, frozen: Params) -> Params:
    return {**frozen, **gates}


@jax.jit
def _shifted(base: Params, delta: Stacked) -> dict[str, Tensor]:
    return {name: base[name] + delta[name] for name in base}


def expert_name(matrix: str, step: int) -> str:
    """Stem of the names of the factors that the task after `step` others adds to a matrix."""
    return f"{matrix.removesuffix('.weight')}.experts.{step}"


def grow(state: MergeState, task: TaskVector, config: WemoeConfig) -> tuple[Stacked, dict[str, Tensor]]:
    """The new D, zero where experts stand, and the factors of all experts, those of this task included.

    Takes the memory of D.
    """
    experts: dict[str, Tensor] = {name: jnp.asarray(x) for name, x in state.added.items() if ".experts." in name}
    rank = config.later_rank if state.step else config.first_rank
    mixed, plain = split(state.delta, is_feed_forward)
    delta = blend(state.delta.only(plain), task.only(plain), keep=1.0, gain=config.scale)
    for members in mixed:
        # Attention may have matrices of the same shape, which then stand in the same stack.
        gains = np.array([0.0 if is_feed_forward(name) else config.scale for name in members], np.float32)
        stacks = (part.only((members,)).stacks[0] for part in (state.delta, task))
        d, a, b = each_layer(_factors, *stacks, gains, config=config)
        delta += Stacked((d,), (members,))
        for i, name in enumerate(members):
            if is_feed_forward(name):
                stem = expert_name(name, state.step)
                experts |= {f"{stem}.a": a[i][:rank], f"{stem}.b": b[i][:, :rank]}
    return delta, experts


def _factors(
    d: Float[jax.Array, "m n"], tau: Float[jax.Array, "m n"], gain: Float[jax.Array, ""], *, config: WemoeConfig
) -> tuple[Float[jax.Array, "m n"], Float[jax.Array, "k n"], Float[jax.Array, "m k"]]:
    """D + gain τ, and the best approximation B A of τ of rank k: A = diag(σ_k) V_kᵀ, B = U_k.

    k is the larger of the config's ranks, so that the first task and the later ones share a program.
    """
    u, s, vt = thin_svd(tau)
    k = max(config.first_rank, config.later_rank)
    return d + gain * tau, s[:k, None] * vt[:k], u[:, :k]


def grow_gates(state: MergeState, task: TaskVector, config: WemoeConfig, seed: int) -> dict[str, Tensor]:
    """All gates with one row more: N(0, 0.01²), and a bias of `scale`."""
    widths: dict[str, int] = {}
    for found in filter(None, map(_FEED_FORWARD.fullmatch, task)):
        n_outputs, n_inputs = task.shapes[found[0]]
        widths[found["block"]] = n_inputs if found["first"] else n_outputs
    gates: dict[str, Tensor] = {}
    for (block, width), key in zip(widths.items(), adapter_keys(seed, state.step + 1, tuple(widths)), strict=True):
        row = GATE_STD * standard_normal(jnp.asarray(key), (1, width))
        grown = {f"{block}.gate.weight": row, f"{block}.gate.bias": jnp.full(1, config.scale, jnp.float32)}
        gates |= {name: _appended(state.added.get(name), x) for name, x in grown.items()}
    return gates


def _appended(rows: Tensor | None, new: Tensor) -> Tensor:
    # Older rows are trained on with the new one: what they knew of their tasks is not kept.
    return new if rows is None else jnp.concatenate([jnp.asarray(rows), new])


RULE = Rule(
    name="wemoe",
    remembers=lambda config: True,
    config=WemoeConfig,
    first=advance,  # an expert of a higher rank, else no exception
    advance=advance,
    scope=attention_and_feed_forward,
    update="attention: θ + λ τ; feed-forward: θ0 + Σ w_i B_i A_i, w from gates trained on the newest task",
    touches="attention and feed-forward matrices",
    cost="1 SVD per feed-forward matrix, a forward and a backward pass per step",
    source="Tang et al., arXiv:2402.00433",
    needs_data=True,
    adds_parameters=True,
    whole_model=True,
)
