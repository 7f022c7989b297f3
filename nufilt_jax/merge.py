"""`python -m nufilt_jax.merge`: arguments, plan, run, report."""

import sys
import types
from typing import Any

if __name__ == "__main__":
    from nufilt_jax.cli import main

    sys.exit(main(prog="python -m nufilt_jax.merge"))


class _Command(types.ModuleType):
    """This module once it is imported, under the name of the function `nufilt_jax.merge`: it can be called as that."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """See `nufilt_jax.api.merge`."""
        from nufilt_jax.api import merge

        return merge(*args, **settings)


sys.modules[__name__].__class__ = _Command
