"""Data-free continual model merging at compiled speed: NUFILT (arXiv:2509.21413v2) in JAX.

`merge` is the whole command as one call; `methods.get` gives a merging rule as a pair of pure functions; `load`, `save`
and `canonical` bring weights in and out; `solve_layer` and `solve_stack` are one step of the method itself.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nufilt_jax import errors as errors
    from nufilt_jax import methods as methods
    from nufilt_jax import models as models
    from nufilt_jax.api import merge as merge
    from nufilt_jax.checkpoints import from_flax as from_flax
    from nufilt_jax.checkpoints import load as load
    from nufilt_jax.checkpoints import save as save
    from nufilt_jax.checkpoints.canonical import canonical as canonical
    from nufilt_jax.compile_cache import enable_compile_cache as enable_compile_cache
    from nufilt_jax.core.layers import LayerSolution as LayerSolution
    from nufilt_jax.core.layers import solve_layer as solve_layer
    from nufilt_jax.core.layers import solve_stack as solve_stack
    from nufilt_jax.methods.adamerging import AdaMergingConfig as AdaMergingConfig
    from nufilt_jax.methods.adapter_only import AdapterOnlyConfig as AdapterOnlyConfig
    from nufilt_jax.methods.continuing import continue_from as continue_from
    from nufilt_jax.methods.iso_c import IsoCConfig as IsoCConfig
    from nufilt_jax.methods.knots import KnotsConfig as KnotsConfig
    from nufilt_jax.methods.magmax import MagmaxConfig as MagmaxConfig
    from nufilt_jax.methods.nufilt import NufiltConfig as NufiltConfig
    from nufilt_jax.methods.null_space import NullSpaceConfig as NullSpaceConfig
    from nufilt_jax.methods.opcm import OpcmConfig as OpcmConfig
    from nufilt_jax.methods.starts import draw_start as draw_start
    from nufilt_jax.methods.sum import SumConfig as SumConfig
    from nufilt_jax.methods.task_arithmetic import TaskArithmeticConfig as TaskArithmeticConfig
    from nufilt_jax.methods.ties import TiesConfig as TiesConfig
    from nufilt_jax.methods.tsv_m import TsvMConfig as TsvMConfig
    from nufilt_jax.methods.weight_average import WeightAverageConfig as WeightAverageConfig
    from nufilt_jax.methods.wemoe import WemoeConfig as WemoeConfig
    from nufilt_jax.methods.wudi import WudiConfig as WudiConfig

__version__ = "0.1.0"

# Loaded at first use: the command line answers --help and --plan without starting JAX.
_HOMES = {
    "merge": "nufilt_jax.api",
    "from_flax": "nufilt_jax.checkpoints",
    "load": "nufilt_jax.checkpoints",
    "save": "nufilt_jax.checkpoints",
    "canonical": "nufilt_jax.checkpoints.canonical",
    "enable_compile_cache": "nufilt_jax.compile_cache",
    "LayerSolution": "nufilt_jax.core.layers",
    "solve_layer": "nufilt_jax.core.layers",
    "solve_stack": "nufilt_jax.core.layers",
    "methods": "nufilt_jax.methods",
    "AdaMergingConfig": "nufilt_jax.methods.adamerging",
    "AdapterOnlyConfig": "nufilt_jax.methods.adapter_only",
    "continue_from": "nufilt_jax.methods.continuing",
    "IsoCConfig": "nufilt_jax.methods.iso_c",
    "KnotsConfig": "nufilt_jax.methods.knots",
    "MagmaxConfig": "nufilt_jax.methods.magmax",
    "NufiltConfig": "nufilt_jax.methods.nufilt",
    "NullSpaceConfig": "nufilt_jax.methods.null_space",
    "OpcmConfig": "nufilt_jax.methods.opcm",
    "draw_start": "nufilt_jax.methods.starts",
    "SumConfig": "nufilt_jax.methods.sum",
    "TaskArithmeticConfig": "nufilt_jax.methods.task_arithmetic",
    "TiesConfig": "nufilt_jax.methods.ties",
    "TsvMConfig": "nufilt_jax.methods.tsv_m",
    "WeightAverageConfig": "nufilt_jax.methods.weight_average",
    "WemoeConfig": "nufilt_jax.methods.wemoe",
    "WudiConfig": "nufilt_jax.methods.wudi",
    "errors": "nufilt_jax.errors",
    "models": "nufilt_jax.models",
}
__all__ = [*sorted(_HOMES)]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nufilt_jax' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    value = home if home.__name__ == f"nufilt_jax.{name}" else getattr(home, name)
    globals()[name] = value
    return value
