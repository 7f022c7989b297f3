"""WUDI-Merging, one task vector at a time: Cheng et al., arXiv:2503.08099.

A linear layer's task vector X stands in for the inputs it was trained on. The merged M should differ from every X,
here D and τ, as little as possible on X's own inputs:

    L(M) = Σ_X ‖(M − X) Xᵀ‖² / ‖X‖².

A few Adam steps start at D + τ. For M = D + τ + E and G_X = XᵀX / ‖X‖²,

    L = c + ⟨E, E H + 2R⟩,   ∇L = 2 (E H + R),
    H = G_D + G_τ,   R = τ G_D + D G_τ,   c = ⟨τ, τ G_D⟩ + ⟨D, D G_τ⟩.

E is small beside D and τ, so nothing large cancels here, as it does in ∇L = 2 (M H − D G_D − τ G_τ).
"""

import dataclasses
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from nufilt_jax.config import MethodConfig, Variant, number
from nufilt_jax.core.adapt import update_of
from nufilt_jax.linalg.dense import gram, norm
from nufilt_jax.linalg.grams import Gram, GramFactor, GramMatrix
from nufilt_jax.linalg.programs import is_traced
from nufilt_jax.methods.elementwise import blend
from nufilt_jax.methods.matrices import each_layer, is_matrix, require_finite, split
from nufilt_jax.methods.selection import every_tensor, is_linear_layer
from nufilt_jax.methods.stacked import Stacked, TaskVector
from nufilt_jax.methods.state import Advance, Context, LayerReport, MergeState, Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class WudiConfig(MethodConfig):
    """WUDI-Merging.

    Attributes:
      learning_rate: Adam's; constant (Table 9).
      steps: Adam steps (Table 9): an early stop, on which the result depends.
      variant: `code` optimises every matrix, embeddings included; `text` linear layers alone.
    """

    learning_rate: float = number(1e-5, above=0)
    # The method's own paper takes 300 to 400. In 50, an entry moves by about 5e-4, the size of τ itself.
    steps: int = 50
    variant: Variant = "code"


def advance(state: MergeState, task: TaskVector, context: Context[WudiConfig]) -> Advance:
    """θ0 + M for the matrices that `variant` names, θ0 + (D + τ)/2 for all other tensors."""
    config = context.config
    is_solved = is_matrix if config.variant == "code" else is_linear_layer
    matrices, others = split(state.delta, is_solved)
    merged = blend(state.delta.only(others), task.only(others), keep=0.5, gain=0.5)
    report: dict[str, LayerReport] = {}
    for members in matrices:
        (d,), (t,) = state.delta.only((members,)).stacks, task.only((members,)).stacks
        shape = t.shape[1:]
        # An embedding may have the shape of a linear layer, and then stands in the same stack.
        solved = np.array([is_solved(name, shape) for name in members])
        part, losses = each_layer(_layer, d, t, solved, config=config, mesh=context.mesh)
        merged += Stacked((part,), (members,))
        told = (losses if is_traced(losses) else jax.device_get(losses))[solved]
        names = [name for name in members if is_solved(name, shape)]
        report |= {name: LayerReport(row) for name, row in zip(names, told, strict=True)}
        if context.on_stack is not None:
            context.on_stack(f"{len(names)} matrices of {shape[0]} x {shape[1]}", LayerReport(told))
    require_finite(merged, "lower --learning-rate")
    return Advance(merged, report)


class _Quadratic(NamedTuple):
    """One layer's loss as a function of Eᵀ; the names are those above."""

    h: Gram
    r: Float[Array, "n m"]
    c: Float[Array, ""]

    def loss_and_gradient(self, e: Float[Array, "n m"]) -> tuple[Float[Array, ""], Float[Array, "n m"]]:
        half = self.h.times(e) + self.r
        return self.c + jnp.sum(e * (half + self.r)), 2 * half


def _layer(
    d: Float[Array, "m n"], t: Float[Array, "m n"], solved: Bool[Array, ""], *, config: WudiConfig
) -> tuple[Float[Array, "m n"], Float[Array, " steps_and_one"]]:
    """M and the loss before every step and after the last; the mean of D and τ for a tensor that is not `solved`."""
    problem = _quadratic(d, t)
    # Adam's own ε of 1e-8 is felt: gradients are 1e-5 and less.
    import optax  # late, as in `core.adapt`

    optimizer = optax.adam(config.learning_rate)

    def step(carry: tuple, _: None) -> tuple[tuple, Float[Array, ""]]:
        e, moments = carry
        loss, gradient = problem.loss_and_gradient(e)
        update, moments = update_of(optimizer, gradient, moments)
        return (e + cast(Array, update), moments), loss

    start = jnp.zeros_like(problem.r)
    (e, _), losses = jax.lax.scan(step, (start, optimizer.init(start)), length=config.steps)
    last, _ = problem.loss_and_gradient(e)
    return jnp.where(solved, d + t + e.T, (d + t) / 2), jnp.append(losses, last)


def _quadratic(d: Float[Array, "m n"], t: Float[Array, "m n"]) -> _Quadratic:
    """Gram matrices are n × n at most: of tall matrices never m × m, of very wide ones never formed at all."""
    m, n = d.shape
    unit_d, unit_t, one = _unit(d), _unit(t), jnp.ones((1, 1), d.dtype)
    if 4 * m < n:  # two products with the 2m rows of both factors are then cheaper than one with H
        g_d, g_t = GramFactor(unit_d, one), GramFactor(unit_t, one)
        h = GramFactor(jnp.concatenate([unit_d, unit_t]), one)
    else:
        g_d, g_t = GramMatrix(gram(unit_d), one), GramMatrix(gram(unit_t), one)
        h = GramMatrix(g_d.matrix + g_t.matrix, one)
    on_d, on_t = g_d.times(t.T), g_t.times(d.T)
    return _Quadratic(h, on_d + on_t, jnp.sum(t.T * on_d) + jnp.sum(d.T * on_t))


def _unit(x: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """X / ‖X‖; zero if X is, which drops its term: 0/0 in the authors' program."""
    size = norm(x)
    return x / jnp.where(size > 0, size, 1)


RULE = Rule(
    name="wudi",
    config=WudiConfig,
    advance=advance,
    scope=every_tensor,
    update="θ0 + M: from D + τ, by Adam, to the least interference with D and τ; vectors: (D + τ)/2",
    touches="every tensor",
    cost="2 Gram matrices, then O(mn²) per Adam step",
    source="Cheng et al., arXiv:2503.08099",
    workspace=3.0,
    spreads=True,
)
