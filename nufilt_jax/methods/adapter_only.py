"""NUFILT's objective without its filter: row 3 of Table 4, arXiv:2509.21413v2."""

from nufilt_jax.config import AdapterOnlyConfig
from nufilt_jax.methods import nufilt
from nufilt_jax.methods.elementwise import blend
from nufilt_jax.methods.selection import published_layers
from nufilt_jax.methods.stacked import TaskVector
from nufilt_jax.methods.state import Advance, Context, MergeState, Rule


def advance(state: MergeState, task: TaskVector, context: Context[AdapterOnlyConfig]) -> Advance:
    """θ^m_1 = θ_1 (Algorithm 1); then θ^m_t = θ^m_{t−1} + τ (I + BA), or + τ B A as the paper's text has it."""
    if state.step == 0:
        return Advance(blend(state.delta, task, keep=0.0, gain=1.0))
    return nufilt.solve_task(state, task, context)


RULE = Rule(
    name="adapter_only",
    config=AdapterOnlyConfig,
    advance=advance,
    scope=published_layers,
    update="θ + τ (I + BA): BA is trained as NUFILT's, on a loss that does not know of a filter",
    touches=nufilt.RULE.touches,
    cost=nufilt.RULE.cost,
    source="Qiu et al., arXiv:2509.21413v2, Table 4 row 3",
)
