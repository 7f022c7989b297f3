"""Where compiled programs are kept between runs."""

import os
from pathlib import Path

from nufilt_jax.errors import ConfigError, Problem


def enable_compile_cache(folder: str | Path | None = None) -> Path:
    """Keeps compiled programs on disk from now on, so that a later process need not compile them again.

    The command line does so by itself; in Python it is the caller's decision, as it holds for all that JAX compiles.

    Args:
      folder: made when something is kept; None for the command line's own.

    Returns:
      The folder.

    Raises:
      ConfigError: none is given, and this user has no home folder.
    """
    import jax  # the command line asks for the folder alone, before JAX is loaded
    from jax.experimental.compilation_cache import compilation_cache

    chosen = str(folder) if folder else default_folder()
    if chosen is None:
        raise ConfigError(Problem("compile cache", "this user has no home folder", "name a folder"))
    path = Path(chosen).expanduser().absolute()
    compilation_cache.reset_cache()  # it may be in use, without a folder or with another
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return path


def default_folder() -> str | None:
    """The command line's: below `NUFILT_CACHE`, or the user's cache; None where this user has no home folder."""
    if chosen := os.environ.get("NUFILT_CACHE"):
        return os.path.join(os.path.expanduser(chosen), "xla")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "nufilt_jax", "xla") if os.path.isabs(cache) else None
