"""`python -m nufilt_jax.merge`: arguments, plan, run, report."""

import sys

from nufilt_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m nufilt_jax.merge"))
