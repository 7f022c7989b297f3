"""The null-space filter without the adapter: row 2 of Table 4, arXiv:2509.21413v2."""

import dataclasses
from typing import cast

from nufilt_jax.config import NufiltConfig, NullSpaceConfig
from nufilt_jax.methods import nufilt
from nufilt_jax.methods.stacked import TaskVector
from nufilt_jax.methods.state import Advance, Context, MergeState, Rule


def advance(state: MergeState, task: TaskVector, context: Context) -> Advance:
    """θ^m_t = θ^m_{t−1} + τ P: NUFILT with r_l = r_v = 0."""
    config = cast(NullSpaceConfig, context.config)
    bare = NufiltConfig(**dataclasses.asdict(config), adapter_rank=0, task_rank=0, steps=0)
    return nufilt.advance(state, task, dataclasses.replace(context, config=bare))


RULE = Rule("null_space", NullSpaceConfig, advance)
