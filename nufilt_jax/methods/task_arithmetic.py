"""Continual task arithmetic: Ilharco et al., arXiv:2212.04089, one task vector at a time."""

from nufilt_jax.config import TaskArithmeticConfig
from nufilt_jax.methods.elementwise import blend
from nufilt_jax.methods.selection import every_tensor
from nufilt_jax.methods.stacked import TaskVector
from nufilt_jax.methods.state import Advance, Context, MergeState, Rule, scaled


def advance(state: MergeState, task: TaskVector, context: Context[TaskArithmeticConfig]) -> Advance:
    """θ^m_t = θ^m_{t−1} + λ τ_t."""
    config = context.config
    return Advance(blend(state.delta, task, keep=float(config.accumulate), gain=config.scale))


RULE = Rule(
    name="task_arithmetic",
    config=TaskArithmeticConfig,
    first=scaled,
    advance=advance,
    scope=every_tensor,
    update="θ + λ τ",
    touches="every tensor",
    cost="O(mn)",
    source="Ilharco et al., arXiv:2212.04089",
)
