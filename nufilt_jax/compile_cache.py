"""Where compiled programs are kept between runs."""

import os
from pathlib import Path

from nufilt_jax.errors import ConfigError, Problem
from nufilt_jax.user_cache import user_cache


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
    """The command line's: in this user's cache; None where that has no place of its own."""
    cache = user_cache()
    if cache is None or not (cache.is_absolute() or os.environ.get("NUFILT_CACHE")):
        return None  # below the current folder each run would have another
    return str(cache / "xla")
