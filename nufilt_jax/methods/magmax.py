"""MagMax-Ind: Marczak et al., arXiv:2407.06322, one task vector at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float

from nufilt_jax.config import Variant
from nufilt_jax.methods.selection import every_tensor
from nufilt_jax.methods.stacked import Stacked, TaskVector, Tensor, TensorStacks, restacked
from nufilt_jax.methods.state import Advance, Context, MergeState, Rule, ScaledConfig, scaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagmaxConfig(ScaledConfig):
    """MagMax-Ind.

    Attributes:
      scale: factor on the entries of largest magnitude; 0.5 for all task counts (Table 9).
      variant: `code` sets D to the running maximum, scaled; `text` adds it at every step (Appendix B.3).
    """

    scale: float = 0.5
    # The rule of `text` depends on the order of tasks; the deviation of 0.0 in Table 1 leaves `code` alone.
    variant: Variant = "code"


def first(state: MergeState, task: TaskVector, context: Context[MagmaxConfig]) -> Advance:
    """θ^m_1 = θ0 + λ M_1 with M_1 = τ_1."""
    if context.config.variant == "code":
        return advance(state, task, context)  # D is zero
    return scaled(state, task, context)._replace(extra=dict(task))


def advance(state: MergeState, task: TaskVector, context: Context[MagmaxConfig]) -> Advance:
    """θ^m_t = θ0 + λ M_t, M_t the entries of largest magnitude of all tasks; of equal ones the newest.

    Nothing is remembered: D is λ M, and λ τ is compared with that, so that M is never found by a division. In the
    `text` variant θ^m_t = θ^m_{t−1} + λ M_t (Appendix B.3 of arXiv:2509.21413v2), and M_t is kept in `extra`, layer by
    layer.
    """
    config = context.config
    scale, names = jnp.float32(config.scale), task.names
    if config.variant == "code":
        return Advance(Stacked(_replace(state.delta.stacks, task.stacks, scale), names))
    delta, largest = _accumulate(state.delta.stacks, restacked(state.extra, names), task.stacks, scale)
    return Advance(Stacked(delta, names), extra=dict(Stacked(largest, names)))


@functools.partial(jax.jit, donate_argnums=0)
def _replace(delta: TensorStacks, task: TensorStacks, scale: Float[Tensor, ""]) -> TensorStacks:
    """λ M_t from λ M_{t−1}, whose memory it takes."""
    return tuple(_larger(d, scale * t) for d, t in zip(delta, task, strict=True))


@functools.partial(jax.jit, donate_argnums=0)
def _accumulate(
    delta: TensorStacks, largest: TensorStacks, task: TensorStacks, scale: Float[Tensor, ""]
) -> tuple[TensorStacks, TensorStacks]:
    """D + λ M_t and M_t; takes the memory of D."""
    largest = tuple(_larger(m, t) for m, t in zip(largest, task, strict=True))
    return tuple(d + scale * m for d, m in zip(delta, largest, strict=True)), largest


def _larger(old: Tensor, new: Tensor) -> Tensor:
    """Element by element the one of larger magnitude; the new one if both are alike, and what is no number."""
    return jnp.where((jnp.abs(new) < jnp.abs(old)) | jnp.isnan(old), old, new)


RULE = Rule(
    name="magmax",
    remembers=lambda config: config.variant == "text",
    config=MagmaxConfig,
    first=first,
    advance=advance,
    scope=every_tensor,
    update="θ0 + λ M: M are the entries of largest magnitude of all tasks",
    touches="every tensor",
    cost="O(mn)",
    elementwise=True,
    source="Marczak et al., arXiv:2407.06322",
    states=2,
    workspace=1.0,
)
