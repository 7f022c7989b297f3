"""Data-free continual model merging at compiled speed: NUFILT (arXiv:2509.21413v2) in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nufilt_jax import methods as methods
    from nufilt_jax import models as models
    from nufilt_jax.checkpoints import from_flax as from_flax
    from nufilt_jax.checkpoints import load as load
    from nufilt_jax.checkpoints import save as save
    from nufilt_jax.compile_cache import enable_compile_cache as enable_compile_cache
    from nufilt_jax.core.solve import LayerSolution as LayerSolution
    from nufilt_jax.core.solve import solve_layer as solve_layer
    from nufilt_jax.core.solve import solve_stack as solve_stack
    from nufilt_jax.methods.nufilt import NufiltConfig as NufiltConfig

__version__ = "0.1.0"

# Loaded at first use: the command line answers --help and --plan without starting JAX.
_HOMES = {
    "methods": "nufilt_jax.methods",
    "models": "nufilt_jax.models",
    "from_flax": "nufilt_jax.checkpoints",
    "load": "nufilt_jax.checkpoints",
    "save": "nufilt_jax.checkpoints",
    "enable_compile_cache": "nufilt_jax.compile_cache",
    "NufiltConfig": "nufilt_jax.methods.nufilt",
    "LayerSolution": "nufilt_jax.core.solve",
    "solve_layer": "nufilt_jax.core.solve",
    "solve_stack": "nufilt_jax.core.solve",
}
__all__ = [*sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nufilt_jax' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    value = home if home.__name__ == f"nufilt_jax.{name}" else getattr(home, name)
    globals()[name] = value
    return value
