"""OPCM, continual merging by orthogonal projection: Tang et al., arXiv:2501.09522, as the authors' program does it.

λ_t = N/a keeps ‖D_t‖ at the mean a of the task vectors' norms, both of the whole model; to undo the rescaling at the
next step, λ and the sum of the norms stay in the state.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from nufilt_jax.config import MethodConfig, number
from nufilt_jax.linalg.dense import inner, matmul, thin_svd, unit_scale
from nufilt_jax.methods.matrices import each_layer, require_finite
from nufilt_jax.methods.selection import every_tensor, is_linear_layer, n_copies
from nufilt_jax.methods.stacked import Stacked, TaskVector, TensorStacks
from nufilt_jax.methods.state import Advance, Context, Look, MergeState, Numbers, Rule, as_it_is


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpcmConfig(MethodConfig):
    """OPCM, orthogonal projection.

    Attributes:
      alpha: share of the nuclear norm of D whose directions the new task may not touch (Table 9). At 1, rounding
        would decide.
      mask_diagonal: also removes the diagonal beyond the leading block, which the authors' program means to do and
        does not.
      skip_class_embedding: adds no task to a CLIP's class embedding, as the authors' program does by accident: it
        keeps the first task's, rescaled.
      embedding_copies: how often a T5's token embedding counts in the norms; 3 in the authors' program.
    """

    # One value for all task counts and for Flan-T5 (Table 9).
    alpha: float = number(0.5, at_least=0, below=1)
    mask_diagonal: bool = False
    skip_class_embedding: bool = True
    embedding_copies: int = number(1, at_least=1)


def first(state: MergeState, task: TaskVector, context: Context[OpcmConfig]) -> Advance:
    """θ^m_1 = θ_1, with λ_1 = 1."""
    numbers = context.numbers or _norms([_look(state, task, context)], context.config, {})
    # The sum of the norms, of which every step takes the mean.
    extra = {"scale": jnp.float32(1), "norms": numbers["task"]}
    return as_it_is(state, task, context)._replace(extra=extra)


def advance(state: MergeState, task: TaskVector, context: Context[OpcmConfig]) -> Advance:
    """θ^m_t = θ0 + (λ_{t−1} D + P(τ)) / λ_t."""
    config = context.config
    sums = _sums(state, task, context)
    numbers = context.numbers or _norms([_sizes(task, config, "task") | _sizes(sums, config, "sum")], config, {})
    norms = jnp.asarray(state.extra["norms"]) + numbers["task"]
    stacks, scale = _rescale(sums.stacks, numbers["sum"], norms / jnp.float32(state.step + 1))
    return Advance(Stacked(stacks, task.names), extra={"scale": scale, "norms": norms})


def _sums(state: MergeState, task: TaskVector, context: Context[OpcmConfig]) -> Stacked:
    """λ D + P(τ) of every tensor; takes the memory of D."""
    config = context.config
    sums = []
    for members, d, t in zip(task.names, state.delta.stacks, task.stacks, strict=True):
        scales = jnp.repeat(jnp.asarray(state.extra["scale"])[None], len(members))
        skipped = np.array([config.skip_class_embedding and name.endswith("class_embedding") for name in members])
        linear = np.array([is_linear_layer(name, t.shape[1:]) for name in members])
        if linear.any():
            sums.append(each_layer(_add_projected, d, t, scales, skipped, linear, config=config, mesh=context.mesh))
        else:
            sums.append(each_layer(_add, d, t, scales, skipped, config=config))
    result = Stacked(tuple(sums), task.names)
    require_finite(result)  # before one layer's NaN is in the norm of all
    return result


def _add(
    d: Float[Array, "*shape"],
    t: Float[Array, "*shape"],
    scale: Float[Array, ""],
    skipped: Bool[Array, ""],
    *,
    config: OpcmConfig,
) -> Float[Array, "*shape"]:
    """λ D + τ; D alone for the tensor that the authors' program passes over."""
    return jnp.where(skipped, d, scale * d + t)


def _add_projected(
    d: Float[Array, "m n"],
    t: Float[Array, "m n"],
    scale: Float[Array, ""],
    skipped: Bool[Array, ""],
    linear: Bool[Array, ""],
    *,
    config: OpcmConfig,
) -> Float[Array, "m n"]:
    """λ D + P(τ), with P the identity for an embedding among the linear weights of its shape."""
    return _add(d, jnp.where(linear, _projected(d, t, config), t), scale, skipped, config=config)


def _projected(d: Float[Array, "m n"], t: Float[Array, "m n"], config: OpcmConfig) -> Float[Array, "m n"]:
    """P(τ) = τ − U_ρ U_ρᵀ τ V_ρ V_ρᵀ for D = U diag(σ) Vᵀ, ρ the last k with Σ_{i≤k} σ_i ≤ α Σ σ.

    The cut is documented as ρ + 1; the authors' program takes ρ, and of the diagonal of Uᵀ τ V, which it means to
    remove whole, only the part in the block. τ itself for D = 0.
    """
    # The thin factors do: what is removed lies within their span, and all else of τ is left alone.
    u, s, vt = thin_svd(d)
    mass = jnp.cumsum(s)
    # Zero singular values count as none, so that D = 0 removes nothing.
    leading = (mass <= config.alpha * mass[-1]) & (s > 0)
    removed = leading[:, None] & leading[None]
    if config.mask_diagonal:
        used = s > s[0] * max(d.shape) * jnp.finfo(d.dtype).eps  # null vectors are the SVD's own choice
        removed |= jnp.diag(used)
    core = jnp.where(removed, matmul(inner(u, t), vt.T), 0)
    return t - matmul(matmul(u, core), vt)


def _look(state: MergeState, task: TaskVector, context: Context[OpcmConfig]) -> Numbers:
    """The sizes of τ's tensors, and after the first task of those of λ D + P(τ) too; takes the memory of D."""
    sizes, config = _sizes(task, context.config, "task"), context.config
    return sizes | _sizes(_sums(state, task, context), config, "sum") if state.step else sizes


def _sizes(model: Stacked, config: OpcmConfig, what: str) -> dict[str, dict[str, Array]]:
    """`_size` of every tensor, each by itself: the compiler adds up a tensor beside others in another order."""
    copies = {name: jnp.float32(n_copies(name, config.embedding_copies)) for name in model}
    return {what: {name: _size(model[name], copies[name]) for name in model}}


@jax.jit
def _size(x: Float[Array, "*shape"], copies: Float[Array, ""]) -> Float[Array, "2"]:
    """A power of two, times which a tensor's entries can be squared, and the sum of their squares then."""
    unit = unit_scale(jnp.max(jnp.abs(x), initial=0)[None, None])[0, 0]
    return jnp.stack([unit, copies * jnp.sum(jnp.square(unit * x))])


def _norms(parts: Sequence[Numbers], config: OpcmConfig, found: Numbers) -> Numbers:
    """The model's norms, from the sizes of all its tensors."""
    sizes = {what: {name: size for part in parts for name, size in part[what].items()} for what in parts[0]}
    return {what: _norm(jnp.stack([jnp.asarray(rows[name]) for name in sorted(rows)])) for what, rows in sizes.items()}


@jax.jit
def _norm(sizes: Float[Array, "tensors 2"]) -> Float[Array, ""]:
    """The norm of all tensors together, in the unit of the largest."""
    units, squares = sizes.T
    unit = jnp.min(units, where=squares > 0, initial=2.0**63)  # that of zeros tells nothing
    return jnp.sqrt(jnp.sum(squares * jnp.square(unit / units))) / unit


@functools.partial(jax.jit, donate_argnums=0)
def _rescale(
    stacks: TensorStacks, norm: Float[Array, ""], mean: Float[Array, ""]
) -> tuple[tuple[jax.Array, ...], Float[Array, ""]]:
    """A model of a norm brought to norm `mean`, and the divisor λ; 1 for a zero model, which stays zero."""
    scale = jnp.where(norm > 0, norm / mean, 1)
    return tuple(jnp.divide(x, scale) for x in stacks), scale


RULE = Rule(
    name="opcm",
    remembers=lambda config: True,  # the norms of the tasks, and λ
    config=OpcmConfig,
    first=first,
    advance=advance,
    scope=every_tensor,
    update="θ0 + (λ' D + P(τ)) / λ: P removes D's leading block, λ keeps the norm at the tasks' mean",
    touches="every tensor",
    cost="1 thin SVD",
    source="Tang et al., arXiv:2501.09522",
    survey=(Look(_look, _norms),),
    first_survey=(Look(_look, _norms),),
    workspace=2.0,
    spreads=True,
)
