"""Test-time adaptation: a few numbers of a model, trained on unlabelled examples by the entropy of its predictions.

Source: Yang et al., arXiv:2310.02575, §3.2; batches and the 1e-8 inside the logarithm are the authors' program's.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from nufilt_jax.config import MethodConfig, number
from nufilt_jax.core.adapt import update_of
from nufilt_jax.errors import ConfigError, Problem, SolveError
from nufilt_jax.methods.data import Batch, Forward, TaskData
from nufilt_jax.methods.selection import is_float
from nufilt_jax.methods.stacked import Params, Tensor
from nufilt_jax.methods.state import Context, LayerReport

Entropy = Literal["of_each", "of_mean"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningConfig(MethodConfig):
    """What the methods share that learn from unlabelled examples (Table 9).

    Attributes:
      learning_rate: Adam's; constant; 1e-3 for Flan-T5 in the authors' settings.
      steps: Adam steps; 100 for Flan-T5.
      batch_size: examples per step; 8 for Flan-T5.
      examples_per_class: size of the seed set.
      entropy: of each example's prediction, or of the batch's mean logits, as the authors' program for Flan-T5 does.
    """

    learning_rate: float = number(1e-4, above=0)
    steps: int = 50
    batch_size: int = number(16, at_least=1)
    examples_per_class: int = number(5, at_least=1)  # labels balance the seed set and are used for nothing else
    entropy: Entropy = "of_each"


TRAINED_MODEL = "model"  # under this name stands the report of a rule that trains all layers at once

_AHEAD = 4  # steps under way at a time, each with its batch on the device

# From the numbers that are trained and those that are not to all parameters by canonical name.
Build = Callable[[Any, Any], Params]


def model_params(base: Params) -> dict[str, jax.Array]:
    """θ0 without its integer buffers, on the device and in float32."""
    return {name: jnp.asarray(x, jnp.float32) for name, x in base.items() if is_float(x.dtype)}


def entropy(logits: Float[Tensor, "examples classes"], kind: Entropy) -> Float[Tensor, ""]:
    """How undecided a model is.

    Args:
      logits: of a batch; −∞ for what is no class.
      kind: `of_each` is the mean over the examples of −Σ_k p_k log(p_k + 1e-8), `of_mean` that of the mean logits.
    """
    if kind == "of_mean":
        logits = jnp.mean(logits, axis=0, keepdims=True)
    # With 1e-8 in the logarithm, a class that is none adds 0 and not 0 · ∞.
    p = jax.nn.softmax(logits, axis=-1)
    return -jnp.mean(jnp.sum(p * jnp.log(p + 1e-8), axis=-1))


def train_by_adam(
    build: Build, variables: Any, frozen: Any, context: Context[LearningConfig], description: str
) -> tuple[Any, LayerReport]:
    """Trains `variables` by Adam for the config's steps, one batch each.

    Args:
      build: gives the model's parameters. A function of a module, so that its program is compiled once.
      variables: what is trained; left as it is.
      frozen: what is not.
      context: its data must hold a batch for every step.
      description: of the variables, for the progress.

    Returns:
      The variables after the last step, and the loss before every step.

    Raises:
      ConfigError: there are too few batches.
      SolveError: the result is not finite.
    """
    import optax  # late, as in `core.adapt`

    config = context.config
    data = cast(TaskData, context.data)
    moments = optax.adam(config.learning_rate).init(variables)
    losses: list[jax.Array] = []
    for batch in _on_device(data, config.steps):
        variables, moments, loss = _step(
            variables,
            moments,
            frozen,
            batch,
            build=build,
            forward=data.forward,
            learning_rate=config.learning_rate,
            kind=config.entropy,
        )
        losses.append(loss)
        # Dispatch returns at once: unbounded, it would have every batch on the device.
        losses[-_AHEAD:][0].block_until_ready()
    report = LayerReport(np.array(jax.device_get(losses), np.float32) if losses else None)
    if not all(np.isfinite(x).all() for x in jax.device_get(jax.tree.leaves((report, variables)))):
        raise SolveError(Problem("data", "the entropy of the model's predictions is not finite", "lower learning_rate"))
    if context.on_stack is not None:
        context.on_stack(description, jax.tree.map(lambda x: x[None], report))
    return variables, report


def _on_device(data: TaskData, steps: int) -> Iterator[Batch]:
    """A batch per step, sent to the device while the step before it runs."""
    for step in range(steps):
        batch = next(data.batches, None)
        if batch is None:
            raise ConfigError(Problem("data", f"there are {step} batches for {steps} steps", "give one for every step"))
        yield jax.device_put(batch)


@functools.partial(jax.jit, static_argnames=("build", "forward", "learning_rate", "kind"))
def _step(
    variables: Any,
    moments: Any,
    frozen: Any,
    batch: Batch,
    *,
    build: Build,
    forward: Forward,
    learning_rate: float,
    kind: Entropy,
) -> tuple[Any, Any, Float[Tensor, ""]]:
    """One step of Adam (β .9/.999, ε 1e-8, no decay), and the loss before it."""
    import optax  # late, as in `core.adapt`

    def loss_of(variables: Any) -> Tensor:
        return entropy(jnp.asarray(forward(build(variables, frozen), batch)), kind)

    loss, gradients = jax.value_and_grad(loss_of)(variables)
    updates, moments = update_of(optax.adam(learning_rate), gradients, moments)
    return optax.apply_updates(variables, updates), moments, loss
