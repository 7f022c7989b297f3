"""Step 2, the adapter: B A trained for a few Adam steps on a loss that needs no data and no weight matrix.

The surrogate of Eqs. (9) and (15)-(17), arXiv:2509.21413v2, is L(A, B) = ‖τ B A V − C‖² for V = [V2 V1] and the
target C of `core.filter`. With G = τᵀτ, K = τᵀ C and Z = A V it becomes

    L = ‖C‖² − 2⟨K, B Z⟩ + ⟨BᵀGB, Z Zᵀ⟩,

so that no step depends on the layer's number of outputs: layers with different outputs share one batch. Where τ has
few rows, G and K stay products with τᵀ, and what is multiplied with it has as few. With the filter, P V2 = 0 and the
columns of V2 have a target of zero: C and K leave them out.

Large weights would overflow it. L is therefore held in a unit of each layer's own, a power of two, which Adam does not
feel: its steps are those of c L with the same multiple of ε.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from nufilt_jax.linalg.dense import inner, matmul
from nufilt_jax.linalg.factored import Matrix, gathered, rows_of
from nufilt_jax.linalg.grams import Gram

EPSILON = 1e-8  # Adam's, of the loss as it is
# Least ε of a scaled loss: where squares of gradients vanish in float32, the steps must too. That is below 1e-19: such
# gradients move nothing by more than a thousandth of the learning rate.
LEAST_EPSILON = 1e-16
START_STD = 0.02  # of A's entries; B starts at zero (arXiv:2509.21413v2, §4)


class Objective(NamedTuple):
    """One layer's surrogate times c, reduced to its n inputs.

    Attributes:
      unit: √c.
      gram: c G, G = τᵀτ.
      pull: what `gram.joined` makes c K of, K = τᵀ C, where the loss wants B A to go, for as many of the last columns
        of [V2 V1] as have a target.
      constant: c ‖C‖², the loss without an adapter.
      prior: V2, directions of the earlier tasks.
      task: V1, directions of the new task.
    """

    unit: Float[Array, "*layers"]
    gram: Gram
    pull: Float[Array, "*layers rows pulled"]
    constant: Float[Array, "*layers"]
    prior: Float[Array, "*layers n r_p"]
    task: Float[Array, "*layers n r_v"]


class Adapter(NamedTuple):
    """The low-rank correction B A of the filter.

    Attributes:
      at: Aᵀ: products of columns are faster on a CPU, half of the small ones several times.
      b: B.
    """

    at: Float[Array, "*layers n r_l"]
    b: Float[Array, "*layers n r_l"]


def reduced_objective(
    gram: Gram,
    task_delta: Float[Matrix, "m n"],
    target: Float[Array, "m pulled"],
    prior: Float[Array, "n r_p"],
    task: Float[Array, "n r_v"],
    unit: Float[Array, ""],
) -> Objective:
    """Builds one layer's `Objective`.

    Args:
      gram: τᵀτ, in any unit.
      task_delta: τ.
      target: √c C, without leading columns that are zero.
      prior: V2.
      task: V1.
      unit: √c.
    """
    gram = gram.scaled((unit / gram.unit) ** 2)
    pull = gram.met(rows_of(task_delta), gathered(task_delta, target))
    return Objective(unit, gram, pull, jnp.sum(target**2), prior, task)


def normal_start(key: UInt32[Array, "2"], rank: int, width: int) -> Float[Array, "r_l n"]:
    """A's start, N(0, 0.02²) from a layer's own raw threefry key."""
    return START_STD * standard_normal(key, (rank, width))


def standard_normal(key: UInt32[Array, "2"], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """N(0, 1) in float32 from a raw threefry key: the same numbers, however JAX is configured."""
    # Both named: generator and order of its numbers are the user's to configure, and a merge must not depend on them.
    with jax.threefry_partitionable(True):
        return jax.random.normal(jax.random.wrap_key_data(key, impl="threefry2x32"), shape, jnp.float32)


def loss_and_gradients(objective: Objective, adapter: Adapter) -> tuple[Float[Array, ""], Adapter]:
    """The surrogate times c and its gradients, written out: they share the products of τᵀτ with B."""
    directions = jnp.concatenate([objective.prior, objective.task], axis=1)
    free = directions.shape[1] - objective.pull.shape[1]  # columns without a target
    z = inner(directions, adapter.at)  # transposed, as all that follows
    z_pulled = z[free:]
    overlap = inner(z, z)
    left, right = objective.gram.halves(adapter.b)
    bgb = inner(left, right)
    b_pull = inner(objective.pull, left)
    # Near its minimum a small difference of large numbers, good to eps ‖C‖²: no gradient is taken through it.
    loss = objective.constant - 2 * jnp.sum(b_pull * z_pulled) + jnp.sum(bgb * overlap)
    grad_b = objective.gram.joined(matmul(right, 2 * overlap) - matmul(objective.pull, 2 * z_pulled))
    grad_z = matmul(z, bgb) - jnp.pad(b_pull, ((free, 0), (0, 0)))
    return loss, Adapter(matmul(directions, 2 * grad_z), grad_b)


def adapt(
    objective: Objective,
    start: Float[Array, "r_l n"],
    *,
    steps: Int[Array, ""] | int,
    learning_rate: Float[Array, ""] | float,
    room: int,
) -> tuple[Adapter, Float[Array, " room"]]:
    """Trains one layer's adapter by Adam (β .9/.999, ε 1e-8, no decay).

    Args:
      objective: of the layer.
      start: A's.
      steps: how many; less than `room`.
      learning_rate: of every step.
      room: for losses.

    Returns:
      The adapter, and the loss, times c, before every step and after the last one; zeros follow.
    """
    # With B at zero the first update is that of the filter alone, and the first loss needs no adapter.
    adapter = Adapter(start.T, jnp.zeros_like(start.T))
    if start.shape[0] == 0:
        # The ablation of r_l = 0; as many losses as ever, so that reports keep their shape.
        return adapter, jnp.full(room, objective.constant)
    import optax  # where something is trained: its start is a tenth of that of a command without work

    # Gradients of c L are c times those of L: so is the ε that leaves the steps as they were.
    epsilon = jnp.maximum(EPSILON * objective.unit**2, LEAST_EPSILON)
    optimizer = optax.adam(learning_rate, eps=cast(float, epsilon))

    def step(i: Int[Array, ""], carry: tuple) -> tuple:
        adapter, moments, losses = carry
        loss, gradients = loss_and_gradients(objective, adapter)
        updates, moments = update_of(optimizer, gradients, moments)
        return optax.apply_updates(adapter, updates), moments, losses.at[i].set(loss)

    losses = jnp.zeros(room, objective.constant.dtype)
    adapter, _, losses = jax.lax.fori_loop(0, steps, step, (adapter, optimizer.init(adapter), losses))
    # The compiler drops what only the gradients need.
    last, _ = loss_and_gradients(objective, adapter)
    return adapter, losses.at[steps].set(last)


def update_of(optimizer: Any, gradients: Any, *state: Any) -> tuple[Any, Any]:
    """One step of an optax optimiser; it mixes types, which the caller's own settings of JAX may forbid."""
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.update(gradients, *state)
