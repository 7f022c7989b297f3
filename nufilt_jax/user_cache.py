"""The folder for what is made once for each user: built-in checkpoints, zero-shot heads, compiled programs."""

import os
import sys
from pathlib import Path


def user_cache() -> Path | None:
    """`$NUFILT_CACHE`, or `nufilt_jax` in the platform's cache folder of this user; None if there is no home folder."""
    if chosen := os.environ.get("NUFILT_CACHE"):
        return Path(os.path.expanduser(chosen))
    if sys.platform == "darwin":
        cache = os.path.expanduser("~/Library/Caches")
    elif sys.platform == "win32":
        cache = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/AppData/Local")
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if cache.startswith("~") else Path(cache) / "nufilt_jax"
