"""Weight averaging: the running mean of the models."""

import dataclasses

from nufilt_jax.config import MethodConfig
from nufilt_jax.methods.elementwise import blend
from nufilt_jax.methods.selection import every_tensor
from nufilt_jax.methods.stacked import TaskVector
from nufilt_jax.methods.state import Advance, Context, MergeState, Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightAverageConfig(MethodConfig):
    """The running mean of the models has no settings."""


def advance(state: MergeState, task: TaskVector, context: Context[WeightAverageConfig]) -> Advance:
    """θ^m_t = ((t−1) θ^m_{t−1} + θ_t) / t."""
    # The mean of the models is θ0 plus the mean of the τ.
    t = state.step + 1
    return Advance(blend(state.delta, task, keep=(t - 1) / t, gain=1 / t))


RULE = Rule(
    name="weight_average",
    config=WeightAverageConfig,
    advance=advance,
    scope=every_tensor,
    update="running mean of the models",
    touches="every tensor",
    cost="O(mn)",
    elementwise=True,
    in_factors=True,
    source="Wortsman et al., arXiv:2203.05482",
)
