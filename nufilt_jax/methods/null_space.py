"""The null-space filter without the adapter: row 2 of Table 4, arXiv:2509.21413v2."""

import dataclasses

from nufilt_jax.methods import nufilt
from nufilt_jax.methods.nufilt import FirstTaskConfig, NufiltConfig
from nufilt_jax.methods.selection import published_layers
from nufilt_jax.methods.stacked import TaskVector
from nufilt_jax.methods.state import Advance, Context, MergeState, Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class NullSpaceConfig(FirstTaskConfig):
    """The null-space filter alone, row 2 of Table 4: the settings of `FirstTaskConfig`."""


def advance(state: MergeState, task: TaskVector, context: Context[NullSpaceConfig]) -> Advance:
    """θ^m_t = θ^m_{t−1} + τ P: NUFILT with r_l = r_v = 0."""
    bare = _bare(context.config)
    return nufilt.advance(state, task, Context(bare, context.seed, context.on_stack, context.data, mesh=context.mesh))


def prepare(state: MergeState, task: TaskVector, config: NullSpaceConfig) -> None:
    """Compiles what `advance` runs."""
    nufilt.prepare(state, task, _bare(config))


def _bare(config: NullSpaceConfig) -> NufiltConfig:
    # Without an adapter, what is left of Eq. (10) is τ P.
    return NufiltConfig(**dataclasses.asdict(config), adapter_rank=0, task_rank=0, steps=0)


RULE = Rule(
    name="null_space",
    config=NullSpaceConfig,
    first=nufilt.first,
    advance=advance,
    prepare=prepare,
    scope=published_layers,
    update="θ + τ P",
    touches=nufilt.RULE.touches,
    cost="1 leading subspace",
    in_factors=True,
    source="Qiu et al., arXiv:2509.21413v2, Table 4 row 2",
    spreads=True,
    by_products=True,
)
