"""Plain sum of task vectors on the selected layers: row 1 of Table 4, arXiv:2509.21413v2."""

import dataclasses

from nufilt_jax.config import MethodConfig
from nufilt_jax.methods.elementwise import blend
from nufilt_jax.methods.selection import published_layers
from nufilt_jax.methods.stacked import TaskVector
from nufilt_jax.methods.state import Advance, Context, MergeState, Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class SumConfig(MethodConfig):
    """The plain sum of task vectors has no settings: row 1 of Table 4."""


def advance(state: MergeState, task: TaskVector, context: Context[SumConfig]) -> Advance:
    """θ^m_t = θ^m_{t−1} + τ_t."""
    return Advance(blend(state.delta, task, keep=1.0, gain=1.0))


RULE = Rule(
    name="sum",
    config=SumConfig,
    advance=advance,
    # Not said in Table 4; taken to be the layers of its rows 2 and 3.
    scope=published_layers,
    update="θ + τ",
    touches="the blocks' linear layers",
    cost="O(mn)",
    elementwise=True,
    in_factors=True,
    source="Qiu et al., arXiv:2509.21413v2, Table 4 row 1",
)
