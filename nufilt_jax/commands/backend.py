"""Whether JAX has the devices that the environment asks for, found out before any work."""

import os

import jax

from nufilt_jax.errors import ConfigError, Problem

_VARIABLES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
_EXTRAS = {"cuda": "nufilt_jax[cuda]", "gpu": "nufilt_jax[cuda]", "tpu": "nufilt_jax[tpu]"}


def require_backend() -> None:
    """Starts the backend that the environment names; JAX chooses one itself if it names none.

    Raises:
      ConfigError: there is no such backend here.
    """
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if not given:
        return
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter, without a word, where a plugin is missing
        name, wanted = next(iter(given.items()))
        extras = dict.fromkeys(extra for kind, extra in _EXTRAS.items() if kind in wanted.lower().split(","))
        fix = " or ".join(["unset it", *(f"install {extra}" for extra in extras)])
        reason = next(iter(str(error).splitlines()), "").split(" (set JAX_PLATFORMS")[0].rstrip(".")
        what = f"{wanted!r} is not available here" + (f": {reason}" if reason else "")
        raise ConfigError(Problem(name, what, fix)) from error
