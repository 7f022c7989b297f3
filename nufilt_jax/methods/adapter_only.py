"""NUFILT's objective without its filter: row 3 of Table 4, arXiv:2509.21413v2."""

from nufilt_jax.config import AdapterOnlyConfig
from nufilt_jax.methods import nufilt
from nufilt_jax.methods.selection import published_layers
from nufilt_jax.methods.state import Rule

RULE = Rule(
    name="adapter_only",
    config=AdapterOnlyConfig,
    advance=nufilt.advance,  # the settings name I + BA, or B A, instead of P + BA
    scope=published_layers,
    update="θ + τ (I + BA): BA is trained as NUFILT's, on a loss that does not know of a filter",
    touches=nufilt.RULE.touches,
    cost=nufilt.RULE.cost,
    source="Qiu et al., arXiv:2509.21413v2, Table 4 row 3",
)
