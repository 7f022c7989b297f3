"""KnOTS-TIES, continual: TIES in the coordinates of a basis that D and τ share (Stoica et al., arXiv:2410.19735).

Which directions count, the kernel and its thresholds are those of the authors' program of arXiv:2509.21413v2.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from nufilt_jax.config import number
from nufilt_jax.errors import ConfigError, Problem
from nufilt_jax.linalg.dense import matmul
from nufilt_jax.linalg.dispatch import each_on_host
from nufilt_jax.linalg.programs import is_traced
from nufilt_jax.methods.selection import is_linear_layer
from nufilt_jax.methods.stacked import Stacked, TaskVector
from nufilt_jax.methods.state import Advance, Context, MergeState, Rule, ScaledConfig, scaled
from nufilt_jax.methods.ties import cut_order, ties_at


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnotsConfig(ScaledConfig):
    """KnOTS-TIES.

    Attributes:
      scale: factor on what is added; 0.3 for 8 tasks, 0.1 for 14 and 20 in the authors' settings.
      density: share of the entries that trimming keeps, as in `TiesConfig`.
      cutoff: singular values up to this are dropped.
    """

    scale: float = 0.3
    # Neither this nor the cutoff is in Table 9: both are the authors' settings.
    density: float = number(0.2, at_least=0, at_most=100)
    cutoff: float = number(1e-4, at_least=0)


# Smallest cutoff, as a share of ‖C‖, for which singular pairs come from C Cᵀ: at a half to a quarter of an SVD's time
# (CPU: 768 x 1536 in 0.15 instead of 0.35 s, 768 x 6144 in 0.3 instead of 1.1 s). In float64 a pair is then off by
# about 1e-16 σ_1² / (σ_k gap); D and τ, which are float32, leave it open by 1e-8 σ_1 / gap, which is more. Updates
# differ from those by an SVD by at most 3e-10, LAPACK's two SVDs by 1e-10, and half an ulp of D and τ changes them by
# 1e-6 to 3e-4 (k^-0.6 to k^-1.5, and 767 values close to the cutoff).
REACH = 1e-5


def advance(state: MergeState, task: TaskVector, context: Context[KnotsConfig]) -> Advance:
    """θ^m_t = θ^m_{t−1} + λ U diag(σ) R, where R is TIES of the halves of Vᵀ.

    Raises:
      ConfigError: under `jax.jit`: the decompositions are the host's.
    """
    config = context.config
    if is_traced((state.delta, task)):
        raise ConfigError(
            Problem("knots", "decomposes on the host and cannot be traced", "call update without jax.jit")
        )
    decompose = functools.partial(basis, cutoff=config.cutoff, density=config.density)
    stacks: list[jax.Array] = []
    for d, t in zip(state.delta.stacks, task.stacks, strict=True):
        outputs = [_aligned_ties(*layer) for layer in each_on_host(decompose, np.asarray(d), np.asarray(t))]
        stacks.append(_add(d, outputs, jnp.float32(config.scale)))
    merged = Stacked(tuple(stacks), state.delta.names)
    return Advance(merged)


class Basis(NamedTuple):
    """What D and τ of one layer are made of: [D, τ] = left · right.

    Attributes:
      left: U diag(σ).
      right: Vᵀ, its rows in any order; those that do not count are zero.
      order: place of the TIES threshold in each half of `right`, among the magnitudes of all its entries: zeros of rows
        that do not count come first and are no part of the share that is kept.
    """

    left: Float[np.ndarray, "m r"]
    right: Float[np.ndarray, "r 2n"]
    order: np.uint32


def basis(merged: Float[np.ndarray, "m n"], task: Float[np.ndarray, "m n"], *, cutoff: float, density: float) -> Basis:
    """The singular pairs of one layer's C = [D, τ] (r = min(m, 2n)), found in float64 and cast.

    Args:
      merged: D.
      task: τ.
      cutoff: pairs with σ up to this do not count.
      density: share of the entries of the rows that count that TIES keeps.
    """
    c = np.concatenate([merged, task], axis=1, dtype=np.float64)
    is_tall = c.shape[0] > c.shape[1]
    u, s, vt = wide_svd(c.T if is_tall else c, cutoff)
    if is_tall:
        u, vt = vt.T, u.T
    counts = ~(s <= cutoff)  # NaN too, so that it comes out
    left, right = np.where(counts, u * s, 0), np.where(counts[:, None], vt, 0)
    n_out, n_in = len(s) - counts.sum(), task.shape[1]
    order = n_out * n_in + cut_order(int(counts.sum()) * n_in, density)
    return Basis(left.astype(np.float32), right.astype(np.float32), np.uint32(order))


def wide_svd(c: Float[np.ndarray, "r k"], cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, σ and Vᵀ of a matrix that is not taller than wide, in any order; NaN if it is not finite.

    Args:
      c: the matrix, float64.
      cutoff: where σ is up to this, the pair need not be right.
    """
    size = np.linalg.norm(c)
    if not np.isfinite(size):
        return np.full((len(c), len(c)), np.nan), np.full(len(c), np.nan), np.full(c.shape, np.nan)
    if cutoff < REACH * size:
        return np.linalg.svd(c, full_matrices=False)
    _, u = np.linalg.eigh(c @ c.T)
    response = u.T @ c
    s = np.linalg.norm(response, axis=1)  # measured: the roots of eigenvalues below 1e-8 σ_1 are noise
    return u, s, response / np.where(s > 0, s, 1)[:, None]


@jax.jit
def _aligned_ties(left: Float[Array, "m r"], right: Float[Array, "r 2n"], order: UInt32[Array, ""]) -> jax.Array:
    """U diag(σ) R of one layer: the same program for every number of directions that count."""
    n = right.shape[1] // 2
    return matmul(left, ties_at(right[:, :n], right[:, n:], order))


@functools.partial(jax.jit, donate_argnums=0)
def _add(
    delta: Float[Array, "layers m n"], outputs: list[Float[Array, "m n"]], scale: Float[Array, ""]
) -> Float[Array, "layers m n"]:
    """D + λ U diag(σ) R; takes the memory of D."""
    return delta + scale * jnp.stack(outputs)


RULE = Rule(
    name="knots",
    config=KnotsConfig,
    first=scaled,  # untrimmed
    advance=advance,
    scope=is_linear_layer,
    update="θ + λ U s TIES(V1, V2): D and τ in one basis, [D, τ] = U s [V1, V2]",
    touches="linear layers",
    cost="1 float64 decomposition of [D, τ], on the host",
    source="Stoica et al., arXiv:2410.19735",
    workspace=4.0,
)
