"""Feed-forward weights that are mixed anew for every batch: LoRA-WEMoE (Tang et al., arXiv:2402.00433).

Beside a block's matrix W [m, n] stand its experts, `experts.0.a` [k, n] and `experts.0.b` [m, k]; the block has a
`gate` with one row per expert. The gate's answers to all tokens of a batch are averaged to one weight w_i per expert,
and the whole batch is computed with W + Σ w_i B_i A_i. So a prediction depends on the batch that it is made in.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_EXPERT = re.compile(r"(?P<matrix>(?P<block>.+\.(mlp|DenseReluDense))\.[^.]+)\.experts\.(?P<number>\d+)\.(a|b)")
_HIGHEST = jax.lax.Precision.HIGHEST


def has_experts(names: Iterable[str]) -> bool:
    """Whether parameters of these canonical names are mixed anew for every batch."""
    return any(_EXPERT.fullmatch(name) for name in names)


def expert_shapes(
    given: Mapping[str, tuple[int, ...]], matrices: Mapping[str, tuple[int, ...]], width: int
) -> dict[str, tuple[int, ...]]:
    """Shapes that a model's gates and experts must have.

    Args:
      given: shapes of all its parameters by canonical name.
      matrices: shapes that it must have without experts.
      width: of the blocks' inputs.
    """
    found = [match for name in given if (match := _EXPERT.fullmatch(name)) and f"{match['matrix']}.weight" in matrices]
    counts: dict[str, int] = {}
    for match in found:
        counts[match["block"]] = max(counts.get(match["block"], 0), 1 + int(match["number"]))
    shapes: dict[str, tuple[int, ...]] = {}
    for block, count in counts.items():
        shapes |= {f"{block}.gate.weight": (count, width), f"{block}.gate.bias": (count,)}
    for matrix, block in {match["matrix"]: match["block"] for match in found}.items():
        n_outputs, n_inputs = matrices[f"{matrix}.weight"]
        for number in range(counts[block]):
            stem = f"{matrix}.experts.{number}"
            rank = (given.get(f"{stem}.a") or (0,))[0]
            shapes |= {f"{stem}.a": (rank, n_inputs), f"{stem}.b": (n_outputs, rank)}
    return shapes


def gate_weights(gate: Mapping[str, Array], hidden: Float[Array, "b tokens d"]) -> Float[Array, " experts"]:
    """w, the mean over tokens and examples of G h + g: the gate is linear, so the mean can be taken first.

    Args:
      gate: its `kernel` [d, experts] and `bias`.
      hidden: input of the block.
    """
    mean = jnp.mean(hidden, axis=(0, 1))
    return jnp.matmul(mean, gate["kernel"], precision=_HIGHEST) + gate["bias"]


def mixed_dense(
    layer: Mapping[str, Any], weights: Float[Array, " experts"], hidden: Float[Array, "b tokens n"]
) -> Float[Array, "b tokens m"]:
    """(W + Σ w_i B_i A_i) h + bias.

    Args:
      layer: its `kernel` Wᵀ, and if it has them `bias` and `experts`.
      weights: w.
      hidden: h.
    """
    kernel, experts = layer["kernel"], layer.get("experts", {})
    n_inputs, n_outputs = kernel.shape
    pairs = [(experts[str(i)]["a"], weights[i] * experts[str(i)]["b"]) for i in range(len(experts))]
    a = jnp.concatenate([jnp.zeros((0, n_inputs), kernel.dtype), *(a for a, _ in pairs)], axis=0).T
    b = jnp.concatenate([jnp.zeros((n_outputs, 0), kernel.dtype), *(b for _, b in pairs)], axis=1).T

    def times(x: Array, y: Array) -> Array:
        return jnp.matmul(x, y, precision=_HIGHEST)

    # Few tokens pass through the factors; for many it is less work to build the matrix once.
    n_tokens = hidden.shape[0] * hidden.shape[1]
    if n_tokens * (n_inputs + n_outputs) < n_inputs * n_outputs:
        answer = times(hidden, kernel) + times(times(hidden, a), b)
    else:
        answer = times(hidden, kernel + times(a, b))
    return answer + layer["bias"][None, None] if "bias" in layer else answer
