"""Whether JAX has the devices that the environment asks for, found out before any work."""

import os
import re
import subprocess
import sys

import jax

from nufilt_jax.errors import ConfigError, Problem

_VARIABLES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
_FLAGS = "XLA_FLAGS"
_LOGGED = re.compile(r"^[EF]\d+ .*?\] (?:Check failed: .*? )?(?P<what>.+)$", re.MULTILINE)
_PATIENCE = 60  # seconds
_EXTRAS = {"cuda": "nufilt_jax[cuda]", "gpu": "nufilt_jax[cuda]", "tpu": "nufilt_jax[tpu]"}


def require_backend() -> None:
    """Starts the backend that the environment names; JAX chooses one itself if it names none.

    Raises:
      ConfigError: there is no such backend here, or XLA refuses its flags.
    """
    _require_known_flags()
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


def _require_known_flags() -> None:
    """Lets another process try the flags: XLA ends the one in which it meets a flag that it does not know.

    Raises:
      ConfigError: it does not know one, or its value.
    """
    if not os.environ.get(_FLAGS):
        return
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    try:
        tried = subprocess.run(
            command,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_PLATFORM_NAME": "", "TF_CPP_MIN_LOG_LEVEL": "0"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired):  # the work itself will tell
        return
    if tried.returncode and (found := _LOGGED.search(tried.stderr)):
        raise ConfigError(Problem(_FLAGS, found["what"].rstrip("."), "correct or unset it"))
