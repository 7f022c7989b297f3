"""Layer-wise AdaMerging (Yang et al., arXiv:2310.02575), one task at a time: a trained coefficient per tensor."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from nufilt_jax.config import Variant
from nufilt_jax.methods.adaptation import TRAINED_MODEL, LearningConfig, model_params, train_by_adam
from nufilt_jax.methods.selection import every_tensor
from nufilt_jax.methods.stacked import Params, Stacked, TaskVector, Tensor
from nufilt_jax.methods.state import Advance, Context, MergeState, Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaMergingConfig(LearningConfig):
    """Layer-wise AdaMerging: one coefficient per tensor, trained on unlabelled examples.

    Attributes:
      init: start of every coefficient (Table 9).
      variant: `code` starts from the backbone with the newest task alone; `text` adds to what is merged (§3.2).
    """

    # Steps of 1e-4 leave a coefficient within 0.005 of this: the published rows are nearly θ0 + 0.3 τ.
    init: float = 0.3
    variant: Variant = "code"


Coefficients = tuple[Tensor, ...]  # one number per tensor, in the stacks of τ


def advance(state: MergeState, task: TaskVector, context: Context[AdaMergingConfig]) -> Advance:
    """`code`: θ^m_t = θ0 + c τ_t, as the authors' program of arXiv:2509.21413v2 does; `text`: θ^m_{t−1} + c τ_t."""
    config = context.config
    # As the text has it, this would be nearly task arithmetic, and far above its row of Table 1.
    kept = state.delta if config.variant == "text" else None
    start = tuple(jnp.full(len(members), config.init, jnp.float32) for members in task.names)
    frozen = (model_params(state.base), kept, task)
    coefficients, report = train_by_adam(_params, start, frozen, context, f"{len(task)} coefficients")
    return Advance(_moved(kept, task, coefficients), {TRAINED_MODEL: report})


def weighted(coefficient: Float[Tensor, ""], tau: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """clip(c, 0, 1) τ; outside [0, 1] the coefficient gets no gradient."""
    return jnp.clip(jnp.asarray(coefficient), 0.0, 1.0) * jnp.asarray(tau)


def _params(coefficients: Coefficients, frozen: tuple[Params, Stacked | None, TaskVector]) -> Params:
    """θ(c) = θ0 + D + c τ. Tensor by tensor: the gradient of a slice of a stack would be as large as the stack."""
    base, kept, task = frozen
    start = base if kept is None else {**base, **{name: base[name] + kept[name] for name in kept}}
    moved: dict[str, Any] = {}
    for members, stack, values in zip(task.names, task.stacks, coefficients, strict=True):
        for i, name in enumerate(members):
            moved[name] = start[name] + weighted(values[i], stack[i])
    return {**start, **moved}


@jax.jit
def _moved(kept: Stacked | None, task: TaskVector, coefficients: Coefficients) -> Stacked:
    """D + c τ, or c τ."""
    pairs = zip(coefficients, task.stacks, strict=True)
    added = tuple(jax.vmap(weighted)(values, stack) for values, stack in pairs)
    if kept is None:
        return Stacked(added, task.names)
    return Stacked(tuple(d + x for d, x in zip(kept.stacks, added, strict=True)), task.names)


RULE = Rule(
    name="adamerging",
    config=AdaMergingConfig,
    first=advance,  # no exception in either variant
    advance=advance,
    scope=every_tensor,
    update="θ0 + c τ of the newest task: c, one per tensor, minimises the entropy of the predictions",
    touches="every tensor",
    cost="a forward and a backward pass per step",
    source="Yang et al., arXiv:2310.02575",
    needs_data=True,
    whole_model=True,
)
