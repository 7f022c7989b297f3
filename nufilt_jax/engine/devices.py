"""The devices of this process among which a window's layers are divided."""

import jax
from jax.sharding import Mesh

from nufilt_jax.config import problem
from nufilt_jax.errors import ConfigError
from nufilt_jax.linalg.spread import layer_mesh
from nufilt_jax.methods import find

ALL = "all"
_SIMULATED = "XLA_FLAGS=--xla_force_host_platform_device_count={} simulates as many on a CPU"


def count_devices(asked: str | None) -> int:
    """How many devices are asked for: 1 if nothing is said.

    Args:
      asked: a whole number, or `all`.

    Raises:
      ConfigError: there are not so many here, or it is no number of devices.
    """
    if asked is None:
        return 1
    try:
        least = 1 if asked == ALL else int(asked)
    except ValueError:
        raise ConfigError(problem("devices", f'must be a whole number or "{ALL}", got {asked!r}')) from None
    if least < 1:
        raise ConfigError(problem("devices", f"must be at least 1, got {asked}"))
    if asked == "1":  # which no backend needs to be started for
        return 1
    there = jax.local_devices()
    if asked == ALL:
        return len(there)
    n_devices = int(asked)
    if n_devices > len(there):
        kind = there[0].platform
        what = f"{n_devices} are asked for, and this process has {len(there)} ({kind})"
        fix = f"ask for at most {len(there)}" + (f"; {_SIMULATED.format(n_devices)}" if kind == "cpu" else "")
        raise ConfigError(problem("devices", what, fix))
    return n_devices


def idle_devices(n_devices: int, method: str) -> tuple[str, ...]:
    """Says, if so, that a method does not use the devices asked for."""
    if n_devices == 1 or find(method).spreads:
        return ()
    return (f"--devices: no effect: {method} does not solve layer by layer, and runs on one device",)


def mesh_of(n_devices: int, method: str) -> Mesh | None:
    """The mesh that a method divides layers over; None for one device."""
    return layer_mesh(jax.local_devices()[:n_devices]) if n_devices > 1 and find(method).spreads else None
