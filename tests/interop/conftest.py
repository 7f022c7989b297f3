"""These tests run in environments of their own, see `make interop`."""

import os

import jax

# transformers' Flax classes are not written for the strict rules of the other tests.
jax.config.update("jax_numpy_dtype_promotion", "standard")
jax.config.update("jax_numpy_rank_promotion", "allow")

os.environ["HF_HUB_OFFLINE"] = "1"
