"""NUFILT's objective without its filter: row 3 of Table 4, arXiv:2509.21413v2."""

import dataclasses

from nufilt_jax.config import Variant
from nufilt_jax.core.settings import RightFactor, SolveConfig
from nufilt_jax.methods import nufilt
from nufilt_jax.methods.selection import published_layers
from nufilt_jax.methods.state import Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOnlyConfig(SolveConfig):
    """NUFILT's objective without its filter: row 3 of Table 4, arXiv:2509.21413v2.

    Attributes:
      variant: `code` adds τ (I + BA), what the authors' program does without the filter; `text` adds τ B A.
    """

    variant: Variant = "code"

    @property
    def right_factor(self) -> RightFactor:
        """What τ is multiplied with to give the update."""
        return "I + BA" if self.variant == "code" else "BA"


RULE = Rule(
    name="adapter_only",
    trains_adapter=True,
    config=AdapterOnlyConfig,
    advance=nufilt.advance,  # the settings name I + BA, or B A, instead of P + BA
    prepare=nufilt.prepare,
    scope=published_layers,
    update="θ + τ (I + BA): BA is trained as NUFILT's, on a loss that does not know of a filter",
    touches=nufilt.RULE.touches,
    cost=nufilt.RULE.cost,
    in_factors=True,
    source="Qiu et al., arXiv:2509.21413v2, Table 4 row 3",
    spreads=True,
    by_products=True,
)
