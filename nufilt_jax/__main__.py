"""`python -m nufilt_jax`: the same as the command `nufilt`."""

import sys

from nufilt_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
