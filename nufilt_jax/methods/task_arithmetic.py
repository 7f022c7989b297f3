"""Continual task arithmetic: Ilharco et al., arXiv:2212.04089, one task vector at a time."""

import dataclasses

from nufilt_jax.methods.elementwise import blend
from nufilt_jax.methods.selection import every_tensor
from nufilt_jax.methods.stacked import TaskVector
from nufilt_jax.methods.state import Advance, Context, MergeState, Rule, ScaledConfig, scaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskArithmeticConfig(ScaledConfig):
    """Task arithmetic.

    Attributes:
      scale: factor on each task vector; 0.3 for 8 tasks, 0.1 for 14 and 20, 0.3 for Flan-T5 (Table 9).
      accumulate: adds to what is merged. False starts from the backbone at every step, as the authors' program for
        Flan-T5 does (Table 2): nothing but the last task remains.
    """

    scale: float = 0.3
    # In Table 2 this row is the pre-trained model's on CoLA, the first task: nothing was added up.
    accumulate: bool = True


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
    elementwise=True,
    in_factors=True,
    source="Ilharco et al., arXiv:2212.04089",
)
